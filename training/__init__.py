"""How artefacts are made: recipes, data, the training loop. Run from a checkout; nothing imports this package."""
