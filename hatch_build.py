"""The wheel's build hook: compile the loops of `backhand.kernels`, or say in one line that there is no compiler.

With a compiler the wheel is one for this platform and every Python 3 (`py3-none-<platform>`): the library knows neither
Python's headers nor torch's. Without, it is a pure one, in which everything goes through torch. BACKHAND_WHEEL_PLATFORM
names another platform tag, such as manylinux_2_28_x86_64 when building where that holds; BACKHAND_KERNELS=none builds
the pure wheel. BACKHAND_WHEEL_TARGET, a key of TARGETS, compiles for another system with the compiler of the PyPI
package ziglang (`make wheels`).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Zig's name, the processor's family, `sys.platform`, the wheel's platform tag.
TARGETS = {
    "linux-x86_64": ("x86_64-linux-gnu.2.28", "x86_64", "linux", "manylinux_2_28_x86_64"),
    "linux-aarch64": ("aarch64-linux-gnu.2.28", "aarch64", "linux", "manylinux_2_28_aarch64"),
    "windows-x86_64": ("x86_64-windows-gnu", "x86_64", "win32", "win_amd64"),
    "macos-arm64": ("aarch64-macos.11.0", "aarch64", "darwin", "macosx_11_0_arm64"),
    "macos-x86_64": ("x86_64-macos.11.0", "x86_64", "darwin", "macosx_11_0_x86_64"),
}
# Where its flags are not those of GCC and Clang.
ZIG_SPELLING = {"-march=armv8.2-a+bf16": "-mcpu=generic+v8_2a+bf16"}


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
        folder, toolchain, tag = builder.BUILT, None, os.environ.get("BACKHAND_WHEEL_PLATFORM")
        if version != "editable" and (target := os.environ.get("BACKHAND_WHEEL_TARGET")):
            triple, machine, system, tag = TARGETS[target]
            folder = Path(self.root) / "build" / "kernels" / target
            zig = (sys.executable, "-m", "ziglang")
            # Linked as C: nothing of a C++ library is called, and zig would compile its own for every instruction set.
            link = (*zig, "cc", "-target", triple, "-s")
            toolchain = builder.Toolchain((*zig, "c++", "-target", triple), machine, system, link, ZIG_SPELLING)
        system = toolchain.system if toolchain else sys.platform
        try:
            names = builder.build(folder, every=version != "editable", toolchain=toolchain)
        except FileNotFoundError as error:
            self.app.display_warning(f"compiled kernels left out: {error}; everything works through torch, slower")
            return
        if version == "editable":
            return
        platform = tag or sysconfig.get_platform()
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + platform.replace("-", "_").replace(".", "_")
        for name in names:
            for path in (builder.library_path(name, folder, system), builder.stamp_path(name, folder)):
                build_data["force_include"][str(path)] = f"backhand/kernels/lib/{path.name}"
