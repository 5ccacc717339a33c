"""The deployment of examples/serving names commands, options, ports and networks that exist and fit each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from foveate.cli.main import app
from foveate.cli.serve import SHUTDOWN
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
    assert networks["front"]["internal"]
    assert SERVICES["vllm"]["networks"] == ["inside"]
    assert {*SERVICES["gateway"]["networks"]} == {"inside", "front"}, "the gateway has a way out"
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
    assert "proxy_request_buffering on" in conf


def test_the_proxy_limits_clients() -> None:
    conf = (FOLDER / "nginx.conf").read_text()
    for needed in (
        "limit_req zone",
        "limit_conn address",
        "limit_conn all",
        "client_header_timeout",
        "client_body_timeout",
        "send_timeout",
    ):
        assert needed in conf
    assert re.search(r"server_name \S+;", conf), "limit_conn counts nothing under an empty name"


def test_it_is_published_to_this_machine_only() -> None:
    (port,) = SERVICES["nginx"]["ports"]
    assert port.startswith("${BIND:-127.0.0.1}:")


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_locked(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["read_only"] is True
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert not {"privileged", "ipc", "pid", "network_mode", "cap_add"} & service.keys()
    assert all("size=" in each for each in service["tmpfs"]), "a tmpfs without a size is memory without a limit"
    assert name == "export" or service["healthcheck"]["test"]


def test_what_clients_reach_has_no_token_and_writes_nowhere() -> None:
    for name in ("gateway", "nginx"):
        assert "HF_TOKEN" not in SERVICES[name].get("environment", {})
        assert all(volume.endswith(":ro") for volume in SERVICES[name]["volumes"])
    assert SERVICES["gateway"]["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" in SERVICES["export"]["environment"]


def test_images_have_versions() -> None:
    images = [service["image"] for service in SERVICES.values() if "image" in service]
    images += re.findall(r"^FROM (\S+)", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert len(images) == 3
    assert all(re.search(r":v?\d+\.\d+\.\d+|@sha256:", image) for image in images)
    assert re.search(r"^USER \d+", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)


def test_only_what_is_needed_goes_into_the_image() -> None:
    lines = (FOLDER.parents[1] / ".dockerignore").read_text().split()
    copied = re.findall(r"^COPY (.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert "*" in lines
    assert {name for group in copied for name in group.split()} == {line[1:] for line in lines if line.startswith("!")}


def test_requests_have_time_to_end() -> None:
    assert int(SERVICES["gateway"]["stop_grace_period"].removesuffix("s")) > SHUTDOWN
