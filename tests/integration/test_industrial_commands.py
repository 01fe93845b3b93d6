"""The industrial app's commands as their user runs them: teach, inspect, evaluate, bad input; learning from defects and training."""

from __future__ import annotations

import csv
import json
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch

import shared_runtime as rt
from apps.common.settings import Settings
from apps.industrial.acquisition.generated import write_dataset
from apps.industrial.bootstrap import open_industrial
from apps.industrial.evaluation.dataset import good_samples, labelled_samples
from apps.industrial.features import prepared
from apps.industrial.images import png
from shared_runtime.graph.passes.base import plain_session
from tests.conftest import Commands
from tests.services import free_port


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A small data set in the MVTec layout."""
    write_dataset(tmp_path / "parts", "brushed", good=24, each=4)
    return tmp_path / "parts"


def bomb(path: Path) -> Path:
    """A PNG whose header states 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))
    return path


def test_teach_inspect_and_what_is_refused(commands: Commands, parts: Path, tmp_path: Path) -> None:
    done = commands.run("industrial", "teach", "--good", parts / "train" / "good", "--recipe", "plate", "--json", "-")
    assert done.returncode == 0, done.stderr
    taught = json.loads(done.stdout)
    assert taught["recipe"]["good"] == 24
    assert "only 24 good parts" in done.stderr
    assert "ten more held about" in taught["advice"]
    done = commands.run("industrial", "teach", "--recipe", "plate", "--good", parts / "test" / "good", "--again", "--json", "-")
    assert json.loads(done.stdout)["recipe"]["good"] == 28
    (parts / "train").rename(parts / "away")
    done = commands.run("industrial", "teach", "--recipe", "plate", "--from-line", "--json", "-")
    assert json.loads(done.stdout)["recipe"]["good"] == 28, "as before: there is no line yet"
    (parts / "away").rename(parts / "train")
    done = commands.run("industrial", "teach", "--recipe", "plaet")
    assert done.returncode == 2
    assert "no recipe 'plaet'; did you mean 'plate'? Teach one with 'triscope industrial teach --good DIR" in " ".join(done.stderr.split())
    done = commands.run("industrial", "thresholds", "--recipe", "plate", "--review-rate", "20", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rates"] == {"review": 0.2, "fail": 0.01}
    assert found["review"]["expected"] == pytest.approx(5 / 29, abs=1e-6)
    assert "review above" in done.stderr
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "hole.png").write_bytes((parts / "test" / "hole" / "0000.png").read_bytes())
    (folder / "black.png").write_bytes(png(np.zeros((256, 256), np.uint8)))
    (folder / "hole.bmp").write_bytes(cv2.imencode(".bmp", np.full((256, 256), 99, np.uint8))[1].tobytes())
    (folder / "cut.png").write_bytes((parts / "test" / "good" / "0000.png").read_bytes()[:400])
    bomb(folder / "bomb.png")
    done = commands.run("industrial", "inspect", folder, "--recipe", "plate", "--out", tmp_path / "out", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    verdicts = {entry["path"]: entry for entry in found["images"]}
    assert verdicts["black.png"]["verdict"] == "review"
    assert verdicts["hole.png"]["verdict"] in ("review", "fail")
    assert verdicts["hole.png"]["boxes"][0]["area"] > 0
    refused = {entry["path"]: entry["reason"] for entry in found["refused"]}
    assert "states 2,500,000,000 pixels" in refused["bomb.png"]
    assert "can't be decoded" in refused["cut.png"]
    pictures = {entry["picture"] for entry in found["images"]}
    assert pictures == {"black.inspected.png", "hole.png.inspected.png", "hole.bmp.inspected.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures
    for arguments, words in (
        (("inspect", folder / "bomb.png", "--recipe", "plate"), "at most 100,000,000"),
        (("inspect", folder, "--recipe", "plat"), "did you mean 'plate'"),
        (("inspect", folder, "--recipe", "../plate"), "can't be used"),
        (("teach", "--good", parts / "train" / "good", "--recipe", "a/b"), "can't be used"),
        (("teach", "--good", tmp_path / "nothing", "--recipe", "plate"), "nothing"),
        (("evaluate", "--dataset", tmp_path), "has no folder 'test'"),
        (("thresholds", "--recipe", "plate", "--fail-rate", "30"), "20 % of good parts to REVIEW and 30 % to FAIL can't be set"),
        (("feed", "carrier-pigeon:7", "--recipe", "plate"), "is unknown; expected folder:DIR"),
        (("feed", "http:telephone", "--recipe", "plate"), "is no port"),
        (("feed", f"folder:{folder}", "--recipe", "nobody"), "nobody"),
        (("feed", f"folder:{folder}", "--recipe", "plate", "--policy", "hope"), "expected wait, drop-oldest or drop-newest"),
    ):
        done = commands.run("industrial", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr.splitlines()[-1]
        assert done.stderr.splitlines()[-1].startswith("triscope: ")


def test_a_folder_is_fed_to_the_line(commands: Commands, parts: Path, settings: Settings) -> None:
    service, log = open_industrial(settings)
    service.teach("plate", good_samples(parts / "train" / "good"))
    arguments = ("feed", f"folder:{parts / 'test' / 'good'}", "--recipe", "plate", "--lot", "L1", "--no-follow", "--json", "-")
    done = commands.run("industrial", *arguments)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"sent": 4, "dropped": 0})
    assert sum(log.lag("industrial", "industrial.frames").values()) == 4
    service.close()
    log.close()


def test_evaluate_states_metrics_that_anyone_can_recompute(commands: Commands, parts: Path, tmp_path: Path) -> None:
    (parts / "test" / "good" / "broken.png").write_bytes(b"broken")
    (parts / "test" / "good" / "taught.png").write_bytes(next((parts / "train" / "good").iterdir()).read_bytes())
    hole = parts / "test" / "hole" / "unfit.png"
    hole.write_bytes((parts / "test" / "hole" / "0000.png").read_bytes())
    (parts / "ground_truth" / "hole" / "unfit_mask.png").write_bytes(png(np.zeros((64, 64), np.uint8)))
    done = commands.run("industrial", "evaluate", "--dataset", parts, "--scores", tmp_path / "s.csv", "--json", "-")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    metrics = result["metrics"]
    assert [entry["path"] for entry in result["refused"]] == ["broken.png", "unfit.png"]
    said = " ".join(done.stderr.split())
    assert "left out broken.png" in said
    assert "1 images that it learned from are left out" in said
    with (tmp_path / "s.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 * 9
    good = [float(row["score"]) for row in rows if "/good/" in row["path"]]
    bad = [float(row["score"]) for row in rows if "/good/" not in row["path"]]
    pairs = [(b > g) + 0.5 * (b == g) for b in bad for g in good]
    assert metrics["image_auroc"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)
    assert {"pixel_auroc", "pro", "recall_at_fpr_1pct", "recall_at_fpr_5pct", "ms_per_image"} <= set(metrics)


def test_labelled_defects_make_a_network_of_the_recipes_own(parts: Path, settings: Settings) -> None:
    service, log = open_industrial(settings)
    good, defects = good_samples(parts / "train" / "good"), labelled_samples(parts, defects_only=True)
    seen: list[str] = []
    taught = service.teach("own", good, defects, seconds=6, device="cpu", report=lambda step, share: seen.append(step))
    assert taught.recipe.facts.defects == len(defects) == 32
    assert {"reading", "learning", "looking"} <= set(seen)
    assert taught.recipe.facts.learned_weight > 0.5
    inspector = service.inspector("own")
    assert inspector.session.model.name.startswith("texture-features-")
    shipped, own = rt.load("texture-features"), inspector.session.model
    assert own.sha256 != shipped.sha256
    assert own.graph.stat().st_size < 4e6
    pixels = {"pixels": np.stack([prepared(sample.read()) for sample in (*defects[:3], *good[:3])])}
    with rt.Session(shipped, "cpu") as session:
        before, after = session.run(pixels), inspector.session.run(pixels)
    for name in ("fine", "half", "whole"):
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=2e-3 * np.abs(before[name]).max(), err_msg=name)
    assert all(np.abs(after[name] - before[name]).max() > 0.01 for name in ("map", "image", "embedding"))
    assert set(before) ^ set(after) == {"coarse", "peak"}
    result = inspector.inspect(defects[0].read())
    assert result.kind == "" or result.kind in taught.recipe.facts.kinds
    assert len(taught.recipe.facts.kinds) == 8
    again = service.recipes.load("own")
    assert again.facts == service.recipes.facts("own")
    assert again.probe is not None
    assert again.probe.joined(np.zeros(6, np.float32), after["whole"])[:3].min() > 0
    service.close()
    log.close()


def test_a_recipes_own_graph_holds_both_networks() -> None:
    """What is shipped computes the statistics' features; the copy says the mean of what its views show, with equal weights only once."""
    from apps.industrial.training.export import LEARNED, LEFT_OUT, OUTPUTS, VIEWS, network_from, taught
    from apps.industrial.training.network import SHARED

    shipped = onnx.load(rt.load("texture-features").graph)
    learned = network_from(shipped)
    generator = torch.Generator().manual_seed(0)
    for name, weights in learned.named_parameters():
        if not name.startswith(("fine.", "coarse.", *(f"trunk.layers.{i}." for i in range(SHARED)))):
            weights.data += torch.randn(weights.shape, generator=generator) * weights.abs().mean() * 0.1
    pixels = torch.rand((3, 3, 256, 256), generator=generator)
    graph, names = taught(shipped, learned), [*(name for name in OUTPUTS if name != LEFT_OUT), "peak"]
    found = dict(zip(names, plain_session(graph).run(names, {"pixels": pixels.numpy()}), strict=True))
    before = dict(zip(OUTPUTS, plain_session(shipped).run(list(OUTPUTS), {"pixels": pixels.numpy()}), strict=True))
    seen = []
    for side, mirrored in VIEWS:
        small = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear")
        with torch.no_grad():
            out = learned(small.flip(3) if mirrored else small)
        peak = out["map"].flatten(1).topk(5).values.mean(dim=1)
        place = torch.nn.functional.interpolate(out["map"][:, None], size=(64, 64), mode="bilinear")[:, 0]
        seen.append(out | {"map": place.flip(2) if mirrored else place, "peak": peak})
    after = {name: torch.stack([view[name] for view in seen]).mean(dim=0).numpy() for name in (*LEARNED, "peak")}
    for name in names:
        wanted = after.get(name, before.get(name))
        scale = np.abs(wanted).max()
        assert np.abs(found[name] - wanted).max() < 1e-2 * scale, name
        assert name not in LEARNED or np.abs(found[name] - before[name]).max() > 5e-2 * scale, name
    trunk = [item for item in graph.graph.initializer if ".trunk.layers." in item.name and "weight" in item.name]
    assert len(trunk) == 40 + 40 - SHARED
    assert graph.ByteSize() < 4e6


def test_the_network_is_trained_again_by_its_command(commands: Commands, data_dir: Path, tmp_path: Path) -> None:
    """A few seconds of it: the model's folder is whole, and its outputs are those of its signature."""
    arguments = ("--backbones", data_dir / "backbones", "--out", tmp_path, "--seconds", "4", "--pool", "32", "--device", "cpu")
    done = commands.run("industrial", "train", *arguments, timeout=500)
    assert done.returncode == 0, done.stderr
    model = rt.load(tmp_path / "texture-features")
    with rt.Session(model, "cpu") as session:
        outputs = session.run({"pixels": np.zeros((2, 3, 256, 256), np.float32)})
    assert outputs["map"].shape == (2, 64, 64)
    assert all(np.isfinite(value).all() for value in outputs.values())


def test_frames_that_were_acknowledged_reach_the_log_when_the_feed_is_stopped(commands: Commands, parts: Path, settings: Settings) -> None:
    service, log = open_industrial(settings)
    service.teach("plate", good_samples(parts / "train" / "good"))
    port = free_port()
    process = commands.start("industrial", "feed", f"http:{port}", "--recipe", "plate")
    content, taken = (parts / "test" / "good" / "0000.png").read_bytes(), 0
    for number in range(12):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/frames?serial={number}", data=content, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                taken += answer.status == 202
        except urllib.error.HTTPError as error:
            error.close()
    assert taken >= 8
    assert commands.stop(process, timeout=15)[0] == 0
    assert sum(log.lag("industrial", "industrial.frames").values()) == taken
    service.close()
    log.close()
