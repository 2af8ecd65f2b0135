"""What docs/rewards.md rewards: an answer that is JSON, and says of the right person what is right."""

import json


def right(completions, name, age, **_):
    """1 for exactly the two keys with the right values; 0.2 for any JSON object."""
    rewards = []
    for said, one, years in zip(completions, name, age, strict=True):
        try:
            found = json.loads(said)
        except ValueError:
            rewards.append(0.0)
            continue
        rewards.append(1.0 if found == {"name": one, "age": years} else 0.2 if isinstance(found, dict) else 0.0)
    return rewards
