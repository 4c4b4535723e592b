"""Puts the patched llama.cpp library and the device profiles into a wheel; an editable install needs neither."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def dependencies(self) -> list[str]:
        if self.target_name != "wheel":
            return []
        return [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard":
            return
        sys.path.insert(0, str(Path(self.root) / "scripts"))
        from _native_build import EDGE, ensure
        from _upstream import BuildError

        try:
            library = ensure([EDGE], os.environ.get("EDGE_RUNTIME_DEVICE", "native"))[EDGE]
        except (BuildError, OSError) as error:
            raise SystemExit(str(error)) from None  # a message, not a traceback
        build_data["force_include"][str(library)] = "edge_runtime/lib"
        build_data["force_include"][str(Path(self.root) / "devices")] = "edge_runtime/devices"
        build_data["pure_python"] = False
        # the code is plain Python with a library beside it: any Python 3, this platform
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
