"""Make src/backhand/report/static/vega.min.js again: Vega, Vega-Lite and vega-embed as one script without a network.

    pip install vl-convert-python
    python tools/vega_bundle.py

vl-convert carries the three libraries inside its wheel and bundles them; the versions are in the first line.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "backhand" / "report" / "static" / "vega.min.js"


def bundle() -> str:
    """The script; it defines `vegaEmbed` on the window and nothing else."""
    vl_convert = import_module("vl_convert")
    versions = (
        f"Vega {vl_convert.get_vega_version()}, Vega-Lite {vl_convert.get_vegalite_versions()[-1]} and "
        f"vega-embed {vl_convert.get_vega_embed_version()}"
    )
    libraries = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    notice = f"/*! {versions}, BSD 3-Clause, with d3, ISC: see LICENSES.txt in this folder. */"
    return f"{notice}\n(()=>{{{libraries.strip()}}})();\n"


if __name__ == "__main__":
    TARGET.write_text(bundle(), encoding="utf-8")
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
