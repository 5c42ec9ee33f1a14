"""Every command of the README and the docs is run by a shell, in a folder that has what it names, with less to do.

What is replaced and what is added to a command stands below. Nothing else is changed: quotes, globs, order of flags.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.dashboards.endpoint import serving
from tests.analysis.local_tasks import write_tasks
from tests.cayley_interp.foreign_writer import model_config, state_dict, untrained, write_checkpoint
from tests.documented import ROOT, Command, commands
from tests.helpers import environment, small_corpus
from tests.molt_lens.host_models import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.gemma]

REPLACED = {
    "/data/": "data/",
    r"hf:HuggingFaceFW/\S+": "'books/*.txt'",
    "HuggingFaceTB/SmolLM2-135M --layer 12": "hosts/llama --layer 1",
    "hf:google/gemma-3-4b-it": "hf:gemma-3-270m",
    "http://localhost:8000": "$ENDPOINT",
    "gemma-3-270m --replacements": "cayley-tiny-2L-sotu --replacements",
    "hellaswag": "words",
    r"--main-process-ip 10\.0\.0\.1 --main-process-port 29500": "--main-process-ip 127.0.0.1 --main-process-port $PORT",
    r"--num-processes \d+": "--multi-gpu --num-processes 2",  # by itself it starts one process where there is no GPU
    "parity cayley-tiny-2L-sotu vanilla-tiny-sotu --data": "parity runs/tiny-0 runs/tiny-vanilla-0 --data",
    r"(analysis\.ablation.*)--data shards": r"\1--data 'books/*.txt'",  # these shards are GPT-2's
}
"""What cannot be reached from a test, by what stands nearest to it on this machine."""

SMALL = "--n-layers 2 --n-ctx 16 --batch-size 2 --warmup 0 --val-tokens 256"
CAYLEY = f"{SMALL} --grad-accum 2 --max-steps 2 --eval-every 1 --checkpoint-every 1 --log-every 1 --device cpu"
BPE = "--tokenizer bpe --d-vocab 300"
MOLT = (
    "--n-ctx 64 --tokens 2048 --epochs 1 --batch-size 512 --val-tokens 512 --behaviour-tokens 256 --buffer-tokens 2048 "
    "--checkpoint-every 1 --device cpu"
)
ON_CAYLEY = "--host cayley-tiny-2L-sotu --host-dtype float32 --layer 3 --target mlp_out"
LESS = {
    "training/train_cayley.py": CAYLEY,
    "training/train_molt.py": MOLT,
    "analysis.parity": "--tokens 256",
    "analysis.matched": "--tolerance 100",  # two steps do not bring two runs to one loss
    "analysis.compare": "--tokens 512 --behaviour-tokens 512 --jacobian-tokens 64",
    "analysis.frontier": "--layers 9 --kinds linear --tokens 4096 --compare.tokens 512 --compare.behaviour-tokens 512 "
    "--compare.jacobian-tokens 64 -- --val-tokens 512 --behaviour-tokens 256",
    "analysis.ablation": f"--variants signed --seeds 0 --max-steps 4 --probe none -- {SMALL} {BPE}",
    "analysis.unit_worth": "--tokens 512",
    "analysis.evaluate_lm": "--limit 2 --include-path tasks",
    "analysis.probing": "--layers 0 --per-speech 1",
    "analysis.ce_bench": "--layer 0 --pairs 20 --per-speech 1",
    "analysis.dashboards": "--tokens 2048 --features top:2",
}
"""Flags that are added: of two that set the same, the last counts."""

NOT_RUN = {
    "git": "clones from a server",
    "cd": "is the shell's",
    ".venv/bin/pip": "changes the environment that the tests run in",
    ".venv/bin/jupyter": "opens a browser and stays; the notebooks themselves run in tests/notebooks",
    "make": "installs into the checkout; CI calls each of these targets by itself",
}
NEEDS_HUB = "gemma-scope-2:"


def less(text: str, port: int) -> str:
    """The command with less to do."""
    for pattern, replacement in REPLACED.items():
        text = re.sub(pattern, replacement, text)
    text = text.replace("$PORT", str(port))
    script = next((word for word in text.split() if word in LESS), "")
    if "--help" in text or "--resume" in text or not script:
        return text
    added = LESS[script]
    if script == "training/train_molt.py" and "--host " not in text and NEEDS_HUB not in text:
        added += f" {ON_CAYLEY}"
    if script == "training/train_cayley.py" and "20B" not in text and "gpt2" not in text:
        added += f" {BPE}"
    if script == "training/train_cayley.py" and "--data" not in text:
        added += " --data shards" if "20B" in text else " --data 'books/*.txt'"
    if "--features" in text:
        added = added.replace("--features top:2", "")
    if "--labels hf:" in text:
        added += " --layers 3"
    (own, *of_runs), (more, *more_of_runs) = text.split(" -- "), added.split(" -- ")
    text = " -- ".join([f"{own} {more}", *filter(None, [" ".join(of_runs + more_of_runs)])])
    other = text.replace("--machine-rank 0", "--machine-rank 1")
    return text if other == text else f"{other} & {text} && wait $!"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def shell(text: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env=environment() | {"PATH": paths} | variables,
    )


def succeed(text: str, folder: Path, **variables: str) -> str:
    """What it says."""
    ended = shell(text, folder, **variables)
    assert ended.returncode == 0, f"{text}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """What the commands name: texts, shards, runs, hosts, a checkpoint, tasks."""
    folder: Path = tmp_path_factory.mktemp("world")
    (folder / "training").symlink_to(ROOT / "training")
    small_corpus(folder / "books")
    for name in ("tasks", "runs", "data"):
        (folder / name).mkdir()
    write_tasks(folder / "tasks")
    tiny_model("llama").save_pretrained(folder / "hosts" / "llama")
    tiny_tokenizer().save_pretrained(folder / "hosts" / "llama")
    write_checkpoint(folder, state_dict(untrained()), model_config(untrained()))
    succeed("python training/data.py tokenize 'books/*.txt' --out shards", folder)
    small = f"{CAYLEY} --data 'books/*.txt' {BPE} --d-model 16 --n-heads 2 --n-layers 6 --max-steps 4"
    cayley = f"{small} --levels '4,3,0;6,4,4'"
    succeed(f"python training/train_cayley.py tiny {cayley} --out runs/tiny", folder)
    succeed(f"python training/train_cayley.py tiny-vanilla {small} --out runs/vanilla", folder)
    for kind in ("molt", "transcoder"):
        gate = "batchtopk:4"
        run = f"python training/train_molt.py {MOLT} {ON_CAYLEY} --kind {kind} --gate {gate} --out runs/{kind}"
        succeed(run, folder)
    for name, copies in {
        "tiny": ["tiny-a", "tiny-b", "tiny-0", "tiny-random-0", "RUN", "cayley", "cayley-tiny-2L-sotu-1"],
        "vanilla": ["tiny-vanilla-0", "vanilla-tiny-sotu-1"],
        "molt": ["molt-1"],
        "transcoder": ["transcoder-1"],
    }.items():
        for copy in copies:
            shutil.copytree(folder / "runs" / name, folder / "runs" / copy)
    shutil.copytree(folder / "runs" / "molt", folder / "frontier" / "runs" / "L5-molt-batchtopk4-s0")
    for run, name in (("tiny", "tiny"), ("molt", "gemma-3-270m-L9-N1")):
        stop(shutil.copytree(folder / "runs" / run, folder / "runs" / f"{name}-20260101-120000"))
    stop(shutil.copytree(folder / "runs" / "tiny", folder / "data" / "small"))
    return folder


def stop(run: Path) -> None:
    """As if it had been stopped before its last step."""
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert len(checkpoints) > 1
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(run / "model", ignore_errors=True)
    (run / "report.html").unlink()


@pytest.fixture
def place(world, tmp_path):
    """A copy of its own for a command to write to."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder, symlinks=True)
    yield folder
    shutil.rmtree(folder)


DOCUMENTED = {command.text: command for command in commands()}
RUN = [command for command in DOCUMENTED.values() if command.words[0] not in NOT_RUN and NEEDS_HUB not in command.text]
ON_THE_HUB = [command for command in DOCUMENTED.values() if NEEDS_HUB in command.text]


def shown(command: Command) -> str:
    return command.text[:80]


@pytest.mark.parametrize("command", RUN, ids=shown)
def test_it_does_what_the_page_says(command, place):
    words = command.words
    out = place / words[words.index("--out") + 1].lstrip("/") if "--out" in words else None
    if out is not None:  # nothing is yet where it writes
        shutil.rmtree(out, ignore_errors=True)
    with serving() as endpoint:
        url = f"http://127.0.0.1:{endpoint.server_port}"
        said = succeed(less(command.text, free_port()), place, ENDPOINT=url)
    assert said.strip()
    if "--num-processes" in words:
        assert " x 2, from step 0" in said
    if out is not None:
        assert out.is_file() or any(out.iterdir())
        if "--labels" in words:
            lines = (out / "work" / "labels.jsonl").read_text().splitlines()
            check_labels([json.loads(line) for line in lines])


@pytest.mark.parametrize("command", ON_THE_HUB, ids=shown)
def test_what_is_on_the_hub_is_asked_for_there(command, place):
    ended = shell(less(command.text, free_port()), place)
    assert ended.returncode != 0
    assert "HF_HUB_OFFLINE" in ended.stdout + ended.stderr


def test_what_is_not_run_here_is_documented_and_ci_makes_what_is_made():
    words = [command.words for command in DOCUMENTED.values()]
    assert {own[0] for own in words if own[0] in NOT_RUN} == set(NOT_RUN)
    made = {own[1] for own in words if own[0] == "make"}
    assert made <= set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))


def check_labels(records: list[dict]) -> None:
    """Each a name with its score, or why there is none; some are named."""
    named = [record["label"] for record in records if record["label"]]
    assert named, [record["why"] for record in records]
    for label in named:
        assert label["name"].strip()
        assert 0 <= label["score"] <= 1
        assert label["contexts"] >= 4
