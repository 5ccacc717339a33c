"""Who may ask the playground, and what nobody may send."""

from __future__ import annotations

import base64
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the extra 'app' is not installed")
from starlette.testclient import TestClient

from foveate.app import server
from foveate.app.comparison import Playground
from foveate.cli.app import app_command
from foveate.cli.common import LOOPBACK
from foveate.errors import InputError


@pytest.fixture(scope="module")
def playground() -> Playground:
    return Playground(["pocket"])


@pytest.fixture(scope="module")
def local(playground, tmp_path_factory):
    app = server.create_app(playground, tmp_path_factory.mktemp("uploads"), hosts=LOOPBACK, key=None, upload_mb=1)
    with TestClient(app, base_url="http://127.0.0.1") as found:
        yield found


def upload(local: TestClient, contents: bytes, name: str = "a.png") -> str:
    sent = local.post("/gradio_api/upload", files={"files": (name, contents)})
    assert sent.status_code == 200, sent.text
    return sent.json()[0]


def event(path: str, function: int) -> dict:
    data = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    return {"data": [data], "fn_index": function, "session_hash": "abc", "event_data": None, "trigger_id": None}


def test_the_page_needs_no_network(local):
    page = local.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for address in ("fonts.googleapis", "fonts.gstatic", "cdnjs", "huggingface.co"):
        assert f'src="https://{address}' not in page.text
        assert f'href="https://{address}' not in page.text


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "http://127.0.0.1/a.png", "file:///etc/passwd", "", 7])
@pytest.mark.parametrize("place", ["/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/call/load"])
def test_no_paths_and_no_addresses(local, path, place):
    answer = local.post(place, json=event(path, 0))
    assert answer.status_code == 400
    assert "upload the file" in answer.text


def test_what_was_uploaded_may_be_named(local):
    path = upload(local, b"no picture")
    assert server.Guard(None, None, (), local.app.uploads)._problem("/", b'{"path": "%s"}' % path.encode()) is None
    outside = path.rpartition("/")[0] + "/../../secret"
    assert server.Guard(None, None, (), local.app.uploads)._problem("/", b'{"path": "%s"}' % outside.encode()) is not None


@pytest.mark.parametrize("file", ["/etc/passwd", "pyproject.toml", "/proc/self/environ"])
def test_files_of_this_machine_are_not_given_out(local, file):
    assert local.get(f"/gradio_api/file={file}").status_code in (403, 404)
    assert "root:" not in local.get(f"/gradio_api/file={file}").text


def test_sizes(local):
    assert local.post("/gradio_api/upload", files={"files": ("a.png", b"0" * (2**20 + 5000))}).status_code == 413
    many = [("files", (f"{number}.png", b"0" * 900_000)) for number in range(3)]
    assert local.post("/gradio_api/upload", files=many).status_code == 413, "a limit of each file is none of a request"
    assert local.post("/gradio_api/upload", content=iter([b"0"] * 9)).status_code == 413, "nor is one without a length"
    assert local.post("/gradio_api/call/upload", content=b"no JSON").status_code == 400
    assert local.post("/gradio_api/queue/join", content=b'"' + b"0" * server.JSON_BYTES + b'"').status_code == 413
    assert local.post("/gradio_api/queue/join", content=b"{").status_code == 400
    assert local.post("/gradio_api/queue/join", content=b"[" * 200_000).status_code == 400


@pytest.mark.parametrize("name", ["upload", "answer", "load", "predict", "nothing"])
@pytest.mark.parametrize("place", ["call/v2", "call", "run", "api"])
@pytest.mark.parametrize("end", ["", "/"])
def test_functions_are_called_by_the_page_alone(local, place, name, end):
    answer = local.post(f"/gradio_api/{place}/{name}{end}", json={"data": []})
    assert answer.status_code == 404
    assert "nothing to call" in answer.text
    assert answer.headers["content-security-policy"]


@pytest.mark.parametrize("number", [10**6, -1, 10**30, "0", 0.5, None, [0], {}])
def test_functions_that_do_not_exist(local, number):
    answer = local.post("/gradio_api/queue/join", json={"data": [], "fn_index": number, "session_hash": "abc"})
    assert answer.status_code == 404
    assert "no such function" in answer.text


def test_functions_that_exist_are_asked_for_by_the_queue(local):
    answer = local.post("/gradio_api/queue/join", json={"data": [], "fn_index": min(local.app.functions), "session_hash": "abc"})
    assert answer.status_code in (200, 422)


def test_no_function_has_a_name_for_others(local):
    assert local.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_other_sites_cannot_ask(local):
    assert local.get("/", headers={"host": "evil.example"}).status_code == 421
    assert local.get("/", headers={"host": "localhost:7860"}).status_code == 200


def test_the_key(playground, tmp_path):
    app = server.create_app(playground, tmp_path, hosts=(), key="secret", upload_mb=1)
    with TestClient(app, base_url="http://10.0.0.1") as found:
        refused = found.get("/")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        assert found.post("/gradio_api/upload", files={"files": ("a.png", b"0")}).status_code == 401
        for wrong in ("Basic !", "Basic " + base64.b64encode(b"me:other").decode(), "Bearer other", "secret"):
            assert found.get("/", headers={"authorization": wrong}).status_code == 401
        assert found.get("/", auth=("me", "secret")).status_code == 200
        assert found.get("/", headers={"authorization": "Bearer secret"}).status_code == 200


def test_others_only_with_a_key(monkeypatch):
    monkeypatch.delenv("FOVEATE_API_KEY", raising=False)
    with pytest.raises(InputError, match="there is no key"):
        app_command(host="0.0.0.0", api_key=None)  # noqa: S104
    monkeypatch.setenv("FOVEATE_API_KEY", "")
    with pytest.raises(InputError, match="is empty"):
        app_command(api_key=None)
    monkeypatch.delenv("FOVEATE_API_KEY")
    with pytest.raises(InputError, match="--api-key is empty"):
        app_command(api_key="")


def test_a_port_that_is_taken(playground, monkeypatch):
    import socket

    monkeypatch.setattr("foveate.app.comparison.Playground", lambda names: SimpleNamespace(models=playground.models))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot be listened at"):
            app_command(model=["pocket"], host="127.0.0.1", port=taken.getsockname()[1], api_key=None, max_upload_mb=1)
