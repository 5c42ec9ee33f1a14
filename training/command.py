"""The command line of a training script: [RECIPE] [--flags] starts a run, --resume DIR continues one."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tyro

from cayley_interp.kernels import Backend
from training.display import console
from training.loop import TrainingDiverged
from training.molt_recipes import MoltRun
from training.recipes import RunConfig

Config = TypeVar("Config", RunConfig, MoltRun)


@dataclass(frozen=True)
class ResumeArgs:
    """Continue a run that was stopped; everything else comes from its config.json."""

    resume: Path
    """Run folder."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Continue on another device."""
    backend: Backend | None = None
    """Continue with other kernels."""
    track: Literal["none", "wandb", "trackio"] | None = None
    """Continue with another tracker."""


@dataclass(frozen=True)
class Command(Generic[Config]):
    """A script that trains by recipes."""

    script: str
    """Its file name."""
    what: str
    """What it does, the beginning of a sentence."""
    recipes: dict[str, tuple[str, Config]]
    """Name to (what it is, the config)."""
    default: str
    """The recipe that is meant when none is named."""
    from_dict: Callable[[dict[str, Any]], Config]
    """The config that a run's config.json holds."""
    train: Callable[[Config, Path, bool], object]
    """Runs a config in its folder, which is a run's already if the last argument is true."""
    markers: tuple[Any, ...] = ()
    """tyro's, for how flags are named."""

    def main(self, argv: list[str] | None = None) -> int:
        """Exit status: 2 with one line for what was wrong, 130 with the way on when interrupted."""
        run_dir: Path | None = None
        try:
            config, run_dir, resume = self.parse(sys.argv[1:] if argv is None else argv)
            self.train(config, run_dir, resume)
        except (TrainingDiverged, ImportError, ValueError, OSError) as error:
            console.print(f"[bold red]{type(error).__name__}[/]", end=": ")
            console.print(str(error), markup=False)
            return 2
        except KeyboardInterrupt:
            way_on = f"; continue with: python training/{self.script} --resume {run_dir}" if run_dir else ""
            console.print(f"stopped{way_on}", markup=False)
            return 130
        return 0

    def parse(self, argv: list[str]) -> tuple[Config, Path, bool]:
        """(config, run folder, whether to resume)."""
        if any(arg == "--resume" or arg.startswith("--resume=") for arg in argv):
            return (*self._resumed(tyro.cli(ResumeArgs, args=argv, prog=self.script)), True)
        recipe = argv[0] if argv and not argv[0].startswith("-") else self.default
        if recipe not in self.recipes:
            raise ValueError(f"no recipe is called {recipe!r}; the recipes are {', '.join(self.recipes)}")
        start = self.recipes[recipe][1]
        config = tyro.cli(
            type(start),
            args=argv[argv[:1] == [recipe] :],
            default=start,
            prog=f"{self.script} {recipe}",
            description=self.help_text(),
            config=(tyro.conf.FlagConversionOff, *self.markers),
        )
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return config, config.out or Path("runs") / f"{config.name}-{stamp}", False

    def help_text(self) -> str:
        """Every recipe with its line, shown above the flags."""
        width = max(len(name) for name in self.recipes)
        recipes = "\n\n".join(f"{name:<{width}}  {line}" for name, (line, _) in self.recipes.items())
        return (
            f"{self.what}: [RECIPE] [--flags], or --resume DIR to continue a run that was stopped.\n\n"
            f"Recipes (the defaults below are those of the recipe named; {self.default} if none is):\n\n{recipes}"
        )

    def _resumed(self, args: ResumeArgs) -> tuple[Config, Path]:
        file = args.resume / "config.json"
        if not file.is_file():
            raise ValueError(f"{args.resume} is not a run folder: it has no config.json. Start a new run with --out.")
        try:
            config = self.from_dict(json.loads(file.read_text()))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not the config of a run of {self.script}: {error}") from error
        changes = {name: value for name in ("device", "backend", "track") if (value := getattr(args, name)) is not None}
        return replace(config, **changes), args.resume
