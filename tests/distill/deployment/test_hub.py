"""The folder for the hub: its model card, and the upload to a hub of our own on this machine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from distill.cli import main
from distill.deployment import hub
from distill.deployment.folder import load_student
from distill.errors import UserError

Refuse = Callable[..., str]


class Hub(ThreadingHTTPServer):
    """Answers as the hub does, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.refuse = False


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path = self.path.split("?")[0]
        self.server.asked[path] = content
        self.server.tokens.add(self.headers.get("Authorization"))
        address = f"http://127.0.0.1:{self.server.server_port}/me/student"
        answer: dict[str, Any] = {"url": address, "id": "me/student"}
        if path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            answer = {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in files
                ]
            }
        elif path.endswith("/commit/main"):
            answer = {"commitUrl": f"{address}/commit/1", "commitOid": "1" * 40, "success": True}
        self._send(401 if self.server.refuse else 200, answer)

    def do_GET(self) -> None:
        answer = {"id": "me/student", "siblings": [], "sha": "0" * 40}
        self._send(401 if self.server.refuse else 200, answer)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def hub_folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose recipe has paths in every place, with changes that are not the card's."""
    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("hub") / "run")
    home = str(finished_run.parent)
    for path in (run / "config.yaml", run / "student" / "student.json"):
        tree = yaml.safe_load(path.read_text())
        recipe = tree.get("recipe", tree)
        recipe["data"]["root"] = recipe["teacher"]["cache"] = recipe["student"]["init_from"] = home
        recipe["policy"]["options"] = {"table": home}
        for kwargs in (recipe["student"]["kwargs"], tree.get("kwargs", {})):
            kwargs["pretrained_cfg_overlay"] = {"file": f"{home}/weights.pth"}
        text = yaml.safe_dump(tree) if path.suffix == ".yaml" else json.dumps(tree)
        path.write_text(text)
    folder = run.parent / "student"
    words = ["--format", "hub", "--out", str(folder), "evaluate.split=val", "seed=77"]
    assert main(["export", str(run), *words, "data.labelled=5"]) == 0
    return folder


def test_the_card_tells_the_run_and_how_to_load_it(hub_folder: Path, finished_run: Path) -> None:
    card = ModelCard.load(hub_folder / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-segmentation"
    assert "diffusion-distill" in card.data.tags
    assert card.data.license == "other"
    result = json.loads((finished_run / "checkpoints" / "distilled" / "result.json").read_text())
    figures = {figure.metric_type: figure.metric_value for figure in card.data.eval_results}
    assert figures["mean_iou"] == pytest.approx(result["scores"]["miou"], abs=1e-4)
    for words in ("`shapes`, 6 labelled images, at 32x32 px", "`diffusers_unet`", "`a2c`"):
        assert words in card.text
    assert 'timm.create_model("local-dir:student", pretrained=True)' in card.text
    assert "for image segmentation, distilled from a teacher (`diffusers_unet`)" in card.text
    load_student(hub_folder)


def test_changes_for_the_images_do_not_change_what_the_card_says(hub_folder: Path) -> None:
    card = ModelCard.load(hub_folder / "README.md")
    assert [figure.dataset_split for figure in card.data.eval_results] == ["test"] * 2
    assert "| seed | 0 |" in card.text
    student = json.loads((hub_folder / "student.json").read_text())
    assert (student["recipe"]["seed"], student["recipe"]["data"]["labelled"]) == (0, 6)


def test_the_folder_tells_nobody_where_its_maker_kept_things(
    hub_folder: Path, finished_run: Path
) -> None:
    recipe = json.loads((hub_folder / "student.json").read_text())["recipe"]
    assert (recipe["output"], recipe["data"]["root"]) == ("runs", None)
    assert recipe["teacher"]["path"] == "tiny"
    for file in hub_folder.iterdir():
        for folder in (finished_run.parent, hub_folder.parent, Path(recipe["teacher"]["path"])):
            if folder.is_absolute():
                assert str(folder).encode() not in file.read_bytes(), file


def test_upload_sends_every_file_to_a_private_repository(hub_folder: Path, server: Hub) -> None:
    endpoint = f"http://127.0.0.1:{server.server_port}"
    said = hub.push(hub_folder, "me/student", token="hf_ours", endpoint=endpoint)
    assert 'timm.create_model("hf-hub:me/student", pretrained=True)' in said
    assert server.tokens == {"Bearer hf_ours"}
    made = json.loads(server.asked["/api/repos/create"])
    assert (made["name"], made["organization"]) == ("student", "me")
    assert made.get("private") or made.get("visibility") == "private"
    lines = server.asked["/api/models/me/student/commit/main"].splitlines()
    sent = {line["value"]["path"] for line in map(json.loads, lines) if line["key"] == "file"}
    assert sent == {path.name for path in hub_folder.iterdir()}
    assert "README.md" in sent


def test_a_hub_that_refuses_is_one_line(hub_folder: Path, server: Hub) -> None:
    server.refuse = True
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(UserError, match=r"was written, but not uploaded: .*401"):
        hub.push(hub_folder, "me/student", token="hf_ours", endpoint=endpoint)


def test_push_needs_a_token_and_a_name(
    finished_run: Path, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    words = ["export", finished_run, "--format", "hub", "--out", tmp_path / "out", "--push"]
    assert "--push needs a token with write access: set HF_TOKEN" in refuse(*words, "me/student")
    assert "--push me/my/student: Repo id must be" in refuse(*words, "me/my/student")
    assert list(tmp_path.iterdir()) == []
