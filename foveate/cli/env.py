"""``foveate env``: versions, devices and extras, for reports of faults."""

from __future__ import annotations

from typing import Any

from .common import out, sayer, starting
from .document import JsonFile, ready_json, tell

EPILOG = "Example:  foveate env"


def env_command(
    json_file: JsonFile = None,
) -> None:
    """What to put into a report of a fault: versions, devices, precision, extras. Nothing of it is secret."""
    ready_json(json_file)
    with starting():
        from ..measuring.environment import environment

        found = environment()
    tell(found, json_file, lambda: sayer(out)("\n".join(f"{name:<14} {value}" for name, value in lines_of(found))))


def lines_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, one a line."""
    machine = found["machine"]
    units = ", ".join(f"{device} {'yes' if has else 'no'}" for device, has in found["bfloat16"].items())
    lines = [(name, str(value)) for name, value in found["versions"].items() if value is not None]
    lines += [
        ("system", machine["system"]),
        ("processor", f"{machine['host']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("CUDA of torch", machine["cuda"] or "none"),
        ("devices", ", ".join(found["devices"]) or "none beside the processor"),
        ("bfloat16 units", units),
        ("extras", ", ".join(name for name, missing in found["extras"].items() if not missing) or "none"),
    ]
    lines += [(f"  {name}", f"lacks {', '.join(missing)}") for name, missing in found["extras"].items() if missing]
    lines += [("packages", ", ".join(f"{name} {version}" for name, version in found["packages"].items()))]
    return lines + [(f"  {name}", value) for name, value in found["variables"].items()]
