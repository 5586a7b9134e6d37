"""Every ``torchx run`` command of the documentation is one that TorchX accepts, without a cluster."""

import re
import shlex
from pathlib import Path

import pytest
from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
from torchx.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/launching.md", "torchx/components.py")


def commands():
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        # --help ends the program
        yield from (command for command in re.findall(r"torchx run [^`\n]*", text) if "--help" not in command)


def test_the_pages_have_commands_for_every_kind_of_scheduler():
    text = "\n".join(commands())
    for scheduler in ("local_cwd", "slurm", "kubernetes", "aws_batch"):
        assert f"-s {scheduler} " in text


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_torchx_accepts_the_command(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    # TorchX refuses an option that was given before, in the same process
    for action in (ArgOnceAction, torchxconfig):
        monkeypatch.setattr(action, "called_args", set())
    main(["run", "--dryrun", *shlex.split(command)[2:]])
    assert "gbla_apps." in capsys.readouterr().out
