import sys

import torch
from helpers import Run, content

from checkpointing.writing import write_checkpoint
from tests.rigs import chaos


def test_without_its_package_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(chaos.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["chaos"])
    assert chaos.main() == 2
    assert capsys.readouterr().err == "error: this takes ckpt-chaos; try: pip install ckpt-chaos\n"


def test_a_fingerprint_tells_one_changed_number_and_one_missing_file(tmp_path):
    run = Run()
    run.steps(2)
    found = []

    def save(*labels):
        write_checkpoint(tmp_path / "c.pt", content(run, checkpoint_path="x"), *labels)
        found.append(chaos.fingerprint(tmp_path))

    save("best"), save("best")
    assert found[0] != found[1]  # there is a previous one now
    save("best")
    assert found[1] == found[2]
    with torch.no_grad():
        run.model.wpe.weight[0, 0] += 1e-6
    save("best")
    (tmp_path / "c.best.pt").unlink()
    save()
    assert len(set(found)) == 4
    assert found[-1].startswith("c.previous.pt c.pt: step 2, ")
