"""The library of measurements: one definition each, used by training, reports and notebooks alike."""
