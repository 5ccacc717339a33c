"""The deployment of examples/serving names commands, options, ports and networks that exist and fit each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from foveate.cli.main import app
from foveate.serving.gateway.requests import Limits

FOLDER = Path(__file__).parents[2] / "examples" / "serving"
SERVICES = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]


def options(command: str) -> set[str]:
    return {name for parameter in get_command(app).commands[command].params for name in parameter.opts}


@pytest.mark.parametrize("service", ["gateway", "export"])
def test_commands_of_foveate_know_their_options(service: str) -> None:
    command, *arguments = SERVICES[service]["command"]
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    assert given <= options(command)
    if service == "gateway":
        assert given >= {"--vllm-url", "--host", "--model"}


def test_keys_come_by_the_environment() -> None:
    known = {parameter.envvar for parameter in get_command(app).commands["serve"].params if parameter.envvar}
    assert known == {"FOVEATE_API_KEY", "FOVEATE_VLLM_KEY"}
    assert known <= SERVICES["gateway"]["environment"].keys()
    inside = SERVICES["vllm"]["environment"]["VLLM_API_KEY"]
    assert inside == SERVICES["gateway"]["environment"]["FOVEATE_VLLM_KEY"]
    assert ":?" in inside, "it starts without a key"


def test_only_the_proxy_is_reachable_and_vllm_only_from_the_gateway() -> None:
    assert [name for name, service in SERVICES.items() if service.get("ports")] == ["nginx"]
    networks = yaml.safe_load((FOLDER / "compose.yaml").read_text())["networks"]
    assert networks["inside"]["internal"]
    assert SERVICES["vllm"]["networks"] == ["inside"]
    assert {name for name, service in SERVICES.items() if "inside" in service["networks"]} == {"vllm", "gateway"}


def test_vllm_reads_the_export_with_embeddings() -> None:
    command, (_, written) = SERVICES["vllm"]["command"], SERVICES["export"]["command"][1:]
    assert f"--model={written}" in command
    assert {"--enable-prompt-embeds", "--chat-template-content-format=openai"} <= {*command}
    assert "export" in SERVICES["vllm"]["depends_on"]


def test_the_proxy_lets_through_what_the_gateway_answers() -> None:
    conf = (FOLDER / "nginx.conf").read_text()
    assert int(re.search(r"client_max_body_size (\d+)m", conf)[1]) * 2**20 > Limits().body_bytes
    assert float(re.search(r"proxy_read_timeout (\d+)s", conf)[1]) > Limits().seconds
    assert "proxy_buffering off" in conf
