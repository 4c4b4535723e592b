"""A systemd that is a table of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.service.systemctl import Done, Systemctl


@dataclass
class FakeSystemd:
    """Notes each command; `answers` are by the command's verb."""

    version: int = 252
    answers: dict[str, Done] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def __call__(self, command: Sequence[str]) -> Done:
        assert command[0] == "systemctl"
        words = [word for word in command[1:] if word not in ("--no-ask-password",)]
        self.commands.append(" ".join(words))
        if words == ["--version"]:
            return Done(0, f"systemd {self.version} ({self.version}.38-1)\n+PAM\n", "")
        verb = next(word for word in words if not word.startswith("--"))
        return self.answers.get(verb, Done(0, "", ""))

    def manager(self, root: Path, *, user: bool = False, running: bool = True) -> Systemctl:
        """A manager that runs on a machine whose / is `root`."""
        if running:
            (root / "run/systemd/system").mkdir(parents=True, exist_ok=True)
        return Systemctl(user=user, run=self, root=root)
