"""How large the gated delta rule is, by a config: what reads the config needs it, and what reads a file's tensors."""

from __future__ import annotations

from backhand.errors import ArtifactError
from backhand.nn.decoder.config_fields import ConfigFields
from backhand.nn.decoder.family import DeltaSizes


def delta_sizes(fields: ConfigFields) -> DeltaSizes:
    """Heads, widths and taps; where the fields are absent the class's defaults.

    Raises:
        ArtifactError: a value is no positive integer, or key heads cannot serve equally many value heads.
    """
    sizes = DeltaSizes(
        key_heads=fields.integer("linear_num_key_heads"),
        value_heads=fields.integer("linear_num_value_heads"),
        key_width=fields.integer("linear_key_head_dim"),
        value_width=fields.integer("linear_value_head_dim"),
        taps=fields.integer("linear_conv_kernel_dim"),
    )
    if sizes.value_heads % sizes.key_heads:
        raise ArtifactError(
            f"{sizes.value_heads} value heads cannot share {sizes.key_heads} key heads",
            where="config.json",
            next_step="fetch the model again",
        )
    return sizes
