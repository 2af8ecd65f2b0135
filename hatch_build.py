"""The wheel's build hook: compile the loops of `backhand.kernels`, or say in one line that there is no compiler.

With a compiler the wheel is one for this platform and every Python 3 (`py3-none-<platform>`): the library knows neither
Python's headers nor torch's. Without, it is a pure one, in which everything goes through torch. BACKHAND_WHEEL_PLATFORM
names another platform tag, such as manylinux_2_28_x86_64 when building where that holds; BACKHAND_KERNELS=none builds
the pure wheel.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _builder(root: Path) -> Any:
    """src/backhand/kernels/build.py as a module, without the package, whose dependencies are not there yet."""
    spec = importlib.util.spec_from_file_location(
        "backhand_kernels_build", root / "src" / "backhand" / "kernels" / "build.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class KernelsHook(BuildHookInterface):  # type: ignore[misc]
    """Compiles before the wheel's files are collected: every instruction set.

    For an editable install what this processor runs, and the library stays in the source tree.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library and, in a wheel proper, add it and name the platform.

        Args:
            version: `standard` or `editable`.
            build_data: hatchling's, changed in place.
        """
        if os.environ.get("BACKHAND_KERNELS") == "none":
            return
        builder = _builder(Path(self.root))
        try:
            names = builder.build(every=version != "editable")
        except FileNotFoundError as error:
            self.app.display_warning(f"compiled kernels left out: {error}; everything works through torch, slower")
            return
        if version == "editable":
            return
        platform = os.environ.get("BACKHAND_WHEEL_PLATFORM") or sysconfig.get_platform()
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + platform.replace("-", "_").replace(".", "_")
        for name in names:
            for path in (builder.library_path(name), builder.stamp_path(name)):
                build_data["force_include"][str(path)] = f"backhand/kernels/lib/{path.name}"
