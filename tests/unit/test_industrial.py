"""The industrial app: images, synthetic parts, statistics of good parts, thresholds, recipes, control charts, templates."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from apps.common.settings import Settings
from apps.industrial import learning
from apps.industrial.acquisition.base import Frame, FrameBuffer
from apps.industrial.anomaly.calibration import calibrate
from apps.industrial.anomaly.regions import GRID, LAYERS, Regions
from apps.industrial.anomaly.statistics import BLOCKS, GoodParts, pooled
from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.evaluation.metrics import auroc, per_region_overlap, recall_at
from apps.industrial.features import MAP
from apps.industrial.images import Pixels, decode_image, deepest, png, read_image, unusable
from apps.industrial.inspection.recipe import checked_name
from apps.industrial.inspection.template import compare
from apps.industrial.spc import p_chart, western_electric
from apps.industrial.synthesis.defects import DEFECTS, add_defect
from apps.industrial.synthesis.patches import patched
from apps.industrial.synthesis.textures import TEXTURES, good_part


def test_a_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = b"IDAT" + zlib.compress(b"0" * 100)
    content += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    with pytest.raises(InputError, match="at most 100,000,000 in all are decoded"):
        decode_image(content)


def test_truncated_and_foreign_bytes_are_refused() -> None:
    whole = png(good_part("granite", np.random.default_rng(0)))
    for content in (whole[: len(whole) // 2], b"", b"hello"):
        with pytest.raises(InputError, match="can't be decoded"):
            decode_image(content)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG"])
def test_several_frames_are_refused_and_a_preview_is_not(kind: str) -> None:
    """Only the first was judged before: a defect on another would have passed."""
    generator = np.random.default_rng(0)
    frames = [Image.fromarray(generator.integers(0, 255, (64, 48)).astype(np.uint8)) for _ in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="3 frames; expected one image"):
        decode_image(buffer.getvalue(), "pages")
    if kind == "TIFF":
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=[frames[1].resize((24, 32))])
        np.testing.assert_array_equal(decode_image(buffer.getvalue()), np.asarray(frames[0]))


def test_floats_of_nought_to_one_are_grey_levels() -> None:
    levels = np.random.default_rng(0).integers(0, 255, (64, 48)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.astype(np.float32) / 255).save(buffer, "TIFF")
    assert np.abs(decode_image(buffer.getvalue()).astype(int) - levels).max() <= 1


@pytest.mark.parametrize("levels", [(0, 255), (0, 1), (0, 3)])
def test_masks_of_any_two_levels_outline_a_defect(levels: tuple[int, int], tmp_path: Path) -> None:
    mask = np.full((128, 128), levels[0], np.uint8)
    mask[32:64, 64:96] = levels[1]
    Image.fromarray(mask).save(tmp_path / "mask.png")
    cells = Sample(tmp_path / "part.png", "hole", tmp_path / "mask.png").cells((128, 128))
    assert cells is not None
    assert cells.sum() == pytest.approx((MAP / 4) ** 2)


def test_sixteen_bits_and_turned_images_are_read() -> None:
    deep = Image.fromarray((np.arange(64 * 32).reshape(32, 64) * 31).astype(np.uint16))
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).dtype == np.uint8
    turned, buffer = Image.new("L", (64, 32)), io.BytesIO()
    exif = turned.getexif()
    exif[274] = 6
    turned.save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).shape == (64, 32)


@pytest.mark.parametrize("colour", [False, True])
def test_a_camera_of_twelve_bits_writes_files_of_sixteen(colour: bool, tmp_path: Path) -> None:
    """White is what the camera can see, the same for all images: of one image alone its brightest place would be taken for it."""
    levels = np.random.default_rng(0).integers(0, 4096, (64, 48, 3) if colour else (64, 48)).astype(np.uint16)
    dim = (levels // 40).astype(np.uint16)
    for name, values in (("bright", levels), ("dim", dim)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), values)
    (tmp_path / "broken.png").write_bytes((tmp_path / "bright.png").read_bytes()[:900])
    Image.new("L", (64, 48), 90).save(tmp_path / "eight.png")
    assert deepest(sorted(tmp_path.iterdir())) == 4095
    assert deepest([tmp_path / "eight.png", tmp_path / "broken.png"]) is None
    expected = levels[..., ::-1] if colour else levels
    for name, divided in (("bright", 1), ("dim", 40)):
        read = decode_image((tmp_path / f"{name}.png").read_bytes(), white=4095)
        assert np.abs(read - (expected // divided) * (255 / 4095)).max() <= 1
    assert read_image(tmp_path / "eight.png", 4095).max() == 90
    assert "black" in str(unusable(decode_image((tmp_path / "dim.png").read_bytes(), white=4095)))
    with pytest.raises(InputError, match="can't be decoded"):
        read_image(tmp_path / "broken.png")


def test_a_dark_deep_frame_is_not_stretched_and_colour_that_opencv_can_not_read_is_as_bright(monkeypatch: pytest.MonkeyPatch) -> None:
    hot = np.zeros((64, 48), np.uint16)
    hot[3, 4] = 1
    assert decode_image(cv2.imencode(".png", hot)[1].tobytes()).max() <= 1
    colour = np.random.default_rng(0).integers(0, 4096, (64, 48, 3)).astype(np.uint16)
    content = cv2.imencode(".png", colour)[1].tobytes()
    exact = decode_image(content, white=4095).astype(int)
    monkeypatch.setattr("apps.industrial.images.cv2.imdecode", lambda *a: None)
    assert np.abs(decode_image(content, white=4095) - exact).max() <= 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bits_of_colour_are_turned_as_eight_are(orientation: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    shallow = Image.fromarray(levels)
    exif = shallow.getexif()
    exif[274] = orientation
    buffer = io.BytesIO()
    shallow.save(buffer, "PNG", exif=exif)
    content = buffer.getvalue()
    deep = cv2.imencode(".png", levels[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    start = content.index(b"eXIf") - 4
    chunk = content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
    deep = deep[:33] + chunk + deep[33:]  # after the header
    np.testing.assert_array_equal(decode_image(deep), decode_image(content))


@pytest.mark.parametrize(("kind", "white"), [(np.float32, 1.0), (np.float64, 255.0), (np.int16, 1023.0), (np.uint32, 65535.0)])
def test_wide_colour_of_a_tiff_is_read(tmp_path: Path, kind: type, white: float) -> None:
    """Kinds that Pillow does not know; as whole, as sane and as large as any other file."""
    share = np.random.default_rng(0).random((64, 48, 3))
    share[0, 0] = 1
    content = cv2.imencode(".tiff", (share[..., ::-1] * white).astype(kind))[1].tobytes()
    assert np.abs(decode_image(content) - share * 255).max() <= 1
    (tmp_path / "part.tiff").write_bytes(content)
    assert deepest([tmp_path / "part.tiff"]) == white
    for size in (4, 9, 100, len(content) - 2):
        with pytest.raises(InputError, match="can't be decoded"):
            decode_image(content[:size])
    with pytest.raises(InputError, match="at least 16 a side"):
        decode_image(cv2.imencode(".tiff", np.zeros((8, 48, 3), kind))[1].tobytes())
    stated = content.replace(*(struct.pack("<HHIHH", 0x100, 3, 1, side, 0) for side in (48, 50_000)))
    stated = stated.replace(*(struct.pack("<HHIHH", 0x101, 3, 1, side, 0) for side in (64, 50_000)))
    with pytest.raises(InputError, match="states 50000 x 50000 pixels"):
        decode_image(stated)


def test_no_damage_to_a_picture_does_worse_than_a_refusal() -> None:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (32, 40, 3)).astype(np.uint8))
    outcomes = {"read": 0, "refused": 0}
    for form in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF"):
        buffer = io.BytesIO()
        picture.save(buffer, form)
        for _ in range(60):
            content = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            edge = generator.integers(0, min(250, len(content)), 3)
            content[np.where(generator.random(3) < 0.5, edge, len(content) - 1 - edge)] = generator.integers(0, 256, 3)
            try:
                decode_image(content.tobytes())
                outcomes["read"] += 1
            except InputError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_a_tiff_without_a_size_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "TIFF")
    content = bytearray(buffer.getvalue())
    place = content.index(struct.pack("<HH", 0x100, 4))
    content[place : place + 2] = struct.pack("<H", 0x9999)
    with pytest.raises(InputError, match="can't be decoded"):
        decode_image(bytes(content))


def test_floats_that_are_no_numbers_are_refused_in_colour_too() -> None:
    levels = np.full((32, 32, 3), 0.5, np.float32)
    levels[4, 5, 1] = np.nan
    with pytest.raises(InputError, match="no numbers"):
        decode_image(cv2.imencode(".tiff", levels)[1].tobytes())


def test_black_and_empty_frames_say_so() -> None:
    assert "black" in str(unusable(np.zeros((64, 64), np.uint8)))
    assert "empty" in str(unusable(np.full((64, 64), 90, np.uint8)))
    assert unusable(good_part("cast", np.random.default_rng(0))) is None


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("texture", ["brushed", "perforated"])
def test_defects_change_the_image_where_their_mask_is(texture: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    good = good_part(texture, rng)
    bad, mask = add_defect(good, kind, rng)
    change = np.abs(bad.astype(int) - good)
    assert mask.any()
    assert change[mask].mean() > change[~mask].mean() + 2
    assert len(TEXTURES) == 10


def test_good_parts_are_near_and_others_far() -> None:
    rng = np.random.default_rng(0)
    fine, whole = rng.normal(0, 1, (40, 6, 32, 32)).astype(np.float32), rng.normal(0, 1, (40, 16)).astype(np.float32)
    parts, _, _ = GoodParts.fit(fine, whole)
    strange = fine[:1].copy()
    strange[0, :, 8:24, 16:32] += 1.5
    scores, maps = parts.judged(strange, whole[:1] + 0.5)
    assert scores[0] > 3
    hot = maps[0]
    assert hot[16:48, 32:].mean() > hot[:, :16].mean() + 1
    again = GoodParts.from_arrays(parts.arrays())
    for one, other in zip(again.judged(fine, whole), parts.judged(fine, whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_places_are_pooled_as_means_over_blocks() -> None:
    fine = np.random.default_rng(1).normal(0, 1, (2, 5, 32, 32)).astype(np.float32)
    for side, blocks in zip(BLOCKS, pooled(fine), strict=True):
        starts = range(0, 32 - side + 1, side // 2)
        wanted = [[fine[:, :, r : r + side, c : c + side].mean(axis=(2, 3)) for c in starts] for r in starts]
        np.testing.assert_allclose(blocks.transpose(1, 2, 0, 3), np.array(wanted), atol=1e-6)


@pytest.mark.parametrize("colour", [False, True])
def test_a_patched_part_is_changed_inside_the_outline(colour: bool) -> None:
    rng = np.random.default_rng(5)
    part, other = good_part("brushed", rng), good_part("brushed", rng)
    if colour:
        part = np.repeat(part[:, :, None], 3, axis=2)
    for seed in range(12):
        image, outline = patched(np.random.default_rng(seed), part, other)
        plain, _ = patched(np.random.default_rng(seed), part, part)
        assert image.shape == ((256, 256, 3) if colour else (256, 256))
        assert image.dtype == np.uint8
        assert 0 < outline.mean() < 0.6
        outside = cv2.dilate(outline, np.ones((41, 41))) == 0
        np.testing.assert_array_equal(image[outside], plain[outside])


@pytest.mark.parametrize("cores", [1, 1000], ids=["both halves at once", "one after the other"])
def test_a_region_that_does_not_belong_is_found_by_what_good_parts_taught(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.industrial.anomaly.regions.CORES_FOR_BOTH", cores)
    shares: list[float] = []

    def look(images: Sequence[Pixels]) -> dict[str, np.ndarray]:
        """Brightness and roughness of places, as a network would describe them."""
        found = {}
        for name, side in zip(LAYERS, (32, 16, 8), strict=True):
            small = np.stack([cv2.resize(image, (side * 4, side * 4), interpolation=cv2.INTER_AREA) for image in images])
            cells = small.reshape(len(images), side, 4, side, 4).astype(np.float32) / 40
            found[name] = np.stack((cells.mean(axis=(2, 4)), cells.std(axis=(2, 4))), axis=1)
        return found

    rng = np.random.default_rng(2)
    good = [good_part("leather", rng) for _ in range(24)]
    regions, unseen = Regions.fit(good, look(good), look, report=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert unseen.shape == (24, 64, 64)
    assert abs(np.median(unseen)) < 1
    inside, outside = [], []
    for _ in range(20):
        image, outline = patched(rng, good_part("leather", rng), good_part("granite", rng))
        (found,) = regions.maps(look([image]))
        small = cv2.resize(outline, (64, 64), interpolation=cv2.INTER_AREA)
        inside.append(found[small > 0.9].mean())
        outside.append(found[small < 0.1].mean())
    assert np.mean(np.array(inside) > np.array(outside)) > 0.7
    again = Regions.from_arrays(regions.arrays())
    assert again is not None
    np.testing.assert_array_equal(again.maps(look(good)), regions.maps(look(good)))
    assert Regions.from_arrays({}) is None
    assert all(mean.shape[1:] == (GRID, GRID) for mean in regions.mean)


def test_regions_of_some_layers_look_at_no_other() -> None:
    rng = np.random.default_rng(4)
    good = [good_part("leather", rng) for _ in range(12)]
    sides = {"fine": 32, "half": 16}

    def look(images: Sequence[Pixels]) -> dict[str, np.ndarray]:
        small = {name: np.stack([cv2.resize(image, (side, side)) / 255.0 for image in images]) for name, side in sides.items()}
        return {name: np.stack((values, values**2), axis=1) for name, values in small.items()}

    regions, _ = Regions.fit(good, look(good), look, names=tuple(sides))
    again = Regions.from_arrays(regions.arrays())
    assert again is not None
    assert again.layers == regions.layers == ("fine", "half")
    np.testing.assert_array_equal(again.maps(look(good)), regions.maps(look(good)))


def test_good_parts_are_learned_from_while_a_gpu_learns_defects() -> None:
    """From the learning's first report on, in another thread; without a report afterwards."""
    fitting, told = threading.Event(), []

    def fit(report: learning.Report) -> str:
        report("patching", 1.0)
        fitting.set()
        return threading.current_thread().name

    def learn(report: learning.Report) -> str:
        report("learning", 0.5)
        assert fitting.wait(10)
        report("learning", 1.0)
        return "folder"

    folder, thread = learning._at_once(learn, fit, lambda step, share: told.append((step, share)))  # type: ignore[arg-type]
    assert (folder, told) == ("folder", [("learning", 0.5), ("learning", 1.0)])
    assert thread != threading.current_thread().name
    assert learning._at_once(lambda report: "folder", fit, lambda step, share: None)[1] == threading.current_thread().name  # type: ignore[arg-type, comparison-overlap, return-value]

    def fail(report: learning.Report) -> str:
        report("learning", 0.5)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        learning._at_once(fail, fit, lambda step, share: None)  # type: ignore[arg-type]


def test_thresholds_state_the_rate_that_they_hold() -> None:
    rng = np.random.default_rng(1)
    rates = []
    for _ in range(30):
        calibration = calibrate(rng.normal(0, 1, 200).tolist())
        rates.append(float((rng.normal(0, 1, 4000) > calibration.review.value).mean()))
        assert calibration.review.value < calibration.fail.value
    assert np.mean(rates) == pytest.approx(calibration.review.expected, abs=0.012)


def test_metrics_on_known_cases() -> None:
    assert auroc([False, False, True, True], [0.1, 0.4, 0.35, 0.8]) == pytest.approx(0.75)
    assert recall_at([False] * 100 + [True] * 2, [*range(100), 200, 50], 0.01) == 0.5
    masks = np.zeros((1, 8, 8), bool)
    masks[0, 2:4, 2:4] = True
    assert per_region_overlap(masks, masks.astype(np.float32)) == pytest.approx(1, abs=0.02)


def test_control_charts_raise_the_rules() -> None:
    assert western_electric([0.1, 3.5]) == [(1, "one point beyond 3 sigma (above)")]
    assert any("eight" in rule for _, rule in western_electric([0.2] * 8))
    quiet = p_chart(([False] * 24 + [True]) * 10)
    assert not [a for a in quiet.alarms if "3 sigma" in a[1]]


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "x" * 70])
def test_recipe_names_stay_inside_their_folder(name: str) -> None:
    with pytest.raises(InputError, match="recipe name"):
        checked_name(name)


def test_the_buffer_drops_by_policy_and_counts() -> None:
    for policy, left in (("drop-oldest", "2"), ("drop-newest", "0")):
        buffer = FrameBuffer(2, policy)  # type: ignore[arg-type]
        for i in range(4):
            buffer.put(Frame(b"", "", str(i)))
        assert buffer.dropped == 2
        first = buffer.get(0)
        assert first is not None
        assert first.serial == left


def test_a_template_shows_what_is_missing_and_what_is_extra() -> None:
    board = np.zeros((200, 200), np.uint8)
    board[40:60, 10:190] = board[120:140, 10:190] = board[60:120, 130:146] = 255
    tested = board.copy()
    tested[40:60, 90:102], tested[80:92, 60:72] = 0, 255
    moved = compare(board, np.roll(tested, (3, -2), (0, 1)))
    assert moved.shift == (-2.0, 3.0)
    kinds = {box.kind for box in compare(board, tested).boxes}
    assert kinds == {"missing", "extra"}
    assert not compare(board, board).boxes
    with pytest.raises(InputError, match="the tested image can't be compared: the frame is black"):
        compare(board, np.zeros_like(board))


def printed_board(random: np.random.Generator) -> Pixels:
    board = np.zeros((480, 640), np.uint8)
    for x, y, w, h in zip(*(random.integers(0, limit, 60) for limit in (640, 480)), *random.integers(10, 70, (2, 60)), strict=True):
        board[y : y + h, x : x + w] = 255 - board[y, x]
    return board


@pytest.mark.parametrize(("dark", "bright", "slope"), [(0, 255, 0), (20, 100, 0), (140, 220, 0), (40, 160, 0.45)])
def test_patterns_are_told_apart_in_any_light(dark: float, bright: float, slope: float) -> None:
    """Nothing is a fixed level: with one at 128 both of two dim pictures were black, and so equal."""
    random = np.random.default_rng(1)
    board = printed_board(random)
    broken = board.copy()
    broken[200:214, 300:314] = 255 - broken[200:214, 300:314]
    light = 1 + slope * np.linspace(-1, 1, 640)

    def seen(printed: Pixels, light: NDArray[np.float64]) -> Pixels:
        levels = (dark + (bright - dark) * printed.astype(float) / 255) * light + random.normal(0, 4, printed.shape)
        return np.clip(levels, 0, 255).astype(np.uint8)

    assert not compare(seen(board, np.ones(640)), seen(board, light)).boxes
    found = compare(seen(board, np.ones(640)), seen(broken, light)).boxes
    assert found
    assert all(abs(box.x + box.width / 2 - 307) < 20 and abs(box.y + box.height / 2 - 207) < 20 for box in found)


@pytest.mark.parametrize(("degrees", "scale", "shift"), [(0, 1, (14, -9)), (3, 1, (0, 0)), (-1.5, 1.01, (6, 8))])
def test_a_board_that_lies_otherwise_differs_nowhere_but_in_its_defect(degrees: float, scale: float, shift: tuple[int, int]) -> None:
    """What comes into the picture at its edge is not in the template: nothing is known of it."""
    random = np.random.default_rng(0)
    board = printed_board(random)
    matrix = cv2.getRotationMatrix2D((320, 240), degrees, scale)
    matrix[:, 2] += shift

    def seen(printed: Pixels) -> Pixels:
        return np.asarray(cv2.warpAffine(printed, matrix, (640, 480), borderMode=cv2.BORDER_REFLECT), np.uint8)

    assert not compare(board, seen(board)).boxes
    broken = board.copy()
    broken[200:214, 300:314] = 255 - broken[200:214, 300:314]
    x, y = matrix @ (307, 207, 1)
    found = compare(board, seen(broken)).boxes
    assert found
    assert all(abs(box.x + box.width / 2 - x) < 20 and abs(box.y + box.height / 2 - y) < 20 for box in found)


def test_the_page_says_what_to_do_while_it_is_empty(settings: Settings) -> None:
    from streamlit.testing.v1 import AppTest

    def script() -> None:
        from apps.industrial.ui.page import industrial, page

        industrial.clear()
        page()

    app = AppTest.from_function(script, default_timeout=60).run()
    assert not app.exception
    assert "triscope industrial teach" in app.info[0].value
