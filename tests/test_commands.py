"""The commands of README and guides run, in the order of their page, with less work than they ask for."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SHARED

for part in ("conversion", "training"):
    sys.path.append(str(ROOT / "tests" / part))

from test_other_trainers import nanogpt_tensors, write_llmc, write_nanogpt  # noqa: E402
from test_tasks import byte_tokenizer_json, task  # noqa: E402

PAGES = ["README.md", *sorted(f"docs/guides/{p.name}" for p in (ROOT / "docs/guides").glob("*.md"))]
PROGRAMS = r"(?:\w+=\S+ )*(?:python|torchrun|make|cp|sbatch|pip|python3)\b"
MARK = re.compile(r"# needs (?:a GPU|the network|several machines)")
# They make environments and run the tests, as .ci/run does.
ELSEWHERE = re.compile(r"make |python3 -m venv|pip install")
LESS = "--num-steps 6 --eval-steps 3 --save-steps 3 --warmup-steps 1 --val-max-tokens 2000 --device cpu --sample-tokens 2"
TINY = "--n-layers 2 --n-heads 2 --d-model 32 --d-ff 64 --max-position-embeddings 64 --seq-len 32 --global-batch-size 8"


def commands_of(page):
    """The indented lines of a page that start a program, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    return [line[4:] for line in text.splitlines() if re.match(f"    {PROGRAMS}", line)]


def words_of(line):
    """A command as words for subprocess, its environment, and whether it goes on until it is stopped."""
    words = shlex.split(line, comments=True)
    env = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    script = next((w for w in words if w.endswith(".py")), "")
    trains = script.startswith("train_") or "train_and_sample" in script
    if "--" in words:  # of bench.py: the flags of a trainer
        words += ["--warmup-steps", "1"]
    elif "--resume" in words and "--init-from" not in words:
        words = [re.sub(r"^\d{4,}$", "9", w) for w in words]  # --num-steps
    elif trains and not {"--help", "toy"} & set(words):
        words += LESS.split()
        if any(w.startswith(("gpt2-", "modern-")) for w in words):
            words += TINY.split()
    if "--minutes" in words:
        words[words.index("--minutes") + 1] = "0.05"
    words = [re.sub(r"--nproc-per-node=\d+", "--nproc-per-node=2", w) for w in words]
    return words, env, "--watch" in words


def models_and_texts_of_others(here):
    """What the pages name of Hugging Face, nanoGPT, llm.c and lm-evaluation-harness."""
    stories = [{"story": f"A tale of {i} cats.", "content": f"Number {i}."} for i in range(900)]
    for path in ("stories.jsonl", "a.jsonl", "tales/train.jsonl"):
        (here / path).parent.mkdir(exist_ok=True)
        (here / path).write_text("".join(json.dumps(s) + "\n" for s in stories))
    (here / "stories.txt").write_text("<|endoftext|>".join(s["story"] for s in stories))
    (here / "models/mistral").mkdir(parents=True)
    for path in ("models/tokenizer.json", "models/mistral/tokenizer.json"):
        (here / path).write_text(byte_tokenizer_json())
    (here / "my_tasks").mkdir()
    task(here / "my_tasks")
    write_nanogpt(here / "ckpt.pt", nanogpt_tensors())
    write_llmc(here / "gpt2_124M.bin", nanogpt_tensors(), 3)
    shutil.copy(ROOT / "docs/speed.md", here / "my.txt")


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that the commands of the pages name."""
    here = tmp_path
    shutil.copytree(ROOT / "references", here / "references")
    pages = [p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))]
    sources = [p.read_text() for p in sorted((ROOT / "corpus").glob("*.py"))]
    (here / "my_folder").mkdir()
    for name, parts in (("book.txt", pages), ("more.txt", sources), ("my_folder/c.md", pages[:3])):
        (here / name).write_text("\n".join(parts))
    (here / "a.txt").write_text("\n".join(pages[:4]))
    (here / "b.txt").write_text("\n".join(sources[:4]))
    (here / "prompts.txt").write_text("def main(\nThe first\n")
    curve = json.loads((here / "references/quickstart.json").read_text())  # of a run of 800 steps
    shorter = {**curve, "val_loss": {"3": 4.0, "6": 4.0}, "tolerance": 0.9}
    (here / "references/quickstart.json").write_text(json.dumps(shorter))
    models_and_texts_of_others(here)
    draw = np.random.default_rng(0)
    for name in ("shard_0", "shard_1", "web", "code"):
        np.save(here / f"{name}.npy", draw.integers(0, 50257, 6000).astype(np.uint16))
    return here


def run(line, here, script):
    """Runs a command to its end: in this process if it is one script, which saves loading torch.
    One that watches is stopped by Ctrl-C.
    """
    words, env, watches = words_of(line)
    if "gpt2" in words and not (SHARED / "tiktoken_cache").exists():
        return
    if words[0] == "python" and words[1] != "bench.py" and not watches:
        code, *out = script(*words[1:])
    else:
        starts = {"torchrun": ["-m", "torch.distributed.run"], "python": []}
        if words[0] in starts:
            paths = [str(ROOT / w) if w.endswith(".py") else w for w in words[1:]]
            words = [sys.executable, *starts[words[0]], *paths]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        with subprocess.Popen(
            words, cwd=here, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            if watches:
                time.sleep(12)
                process.send_signal(signal.SIGINT)
            out, code = process.communicate(timeout=150)[0], process.returncode
    fine = (0, 130) if watches else (0, 2) if "compare" in words else (0,)  # 2: they differ
    assert (code or 0) in fine, f"{shlex.join(words)}\n{out}"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, folder, script, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    lines = [x for x in commands_of(page) if not MARK.search(x) and not ELSEWHERE.match(x)]
    if page == "README.md":  # it names files of earlier runs before the commands that make some
        lines = [x for x in lines if "bench.py" not in x]  # a guide has the same
        run("python train_minimal.py --train-data book.txt", folder, script)
        (folder / "runs").mkdir()
        for copy in ("a.pt", "b.pt", "run.pt", "runs/a.pt"):
            shutil.copy(folder / "checkpoints/minigpt_single.pt", folder / copy)
    for line in lines:
        run(line, folder, script)


def test_pages_have_commands_and_only_marked_ones_are_left_out():
    counts = {page: len(commands_of(page)) for page in PAGES}
    assert min(counts.values()) >= 3 and counts["README.md"] >= 40
    left_out = {line for page in PAGES for line in commands_of(page) if MARK.search(line)}
    assert all(re.search("npy|gpt2|fineweb|hellaswag", line) for line in left_out)


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "data/README.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"
    readme = (ROOT / "README.md").read_text()
    assert all(f"docs/guides/{p.name}" in readme for p in (ROOT / "docs/guides").glob("*.md"))
