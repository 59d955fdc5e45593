"""The built-in faces."""

import hashlib

import numpy as np
import pytest

from src.errors import UserError
from src.faces import draw_face, write_dataset


def test_an_id_is_always_the_same_face(faces):
    for identity in (1, 7):
        again = np.asarray(draw_face(identity))
        assert again.shape == (64, 64, 3) and np.array_equal(again, np.asarray(draw_face(identity)))
    digest = hashlib.sha256(b"".join(draw_face(i).tobytes() for i in range(1, 9))).hexdigest()
    assert digest[:16] == "1ae940ff07333b11"


def test_faces_differ_visibly():
    thumbnails = np.stack([np.asarray(draw_face(i).resize((16, 16)), dtype=np.float32).ravel() for i in range(1, 401)])
    squares = (thumbnails**2).sum(1)
    distance = squares[:, None] + squares - 2 * thumbnails @ thumbnails.T
    np.fill_diagonal(distance, np.inf)
    rms = np.sqrt(distance.min() / thumbnails.shape[1])
    assert rms > 8, f"the two most alike differ by {rms:.1f} of 255"


def test_faces_are_antialiased_and_scale():
    colours = len(np.unique(np.asarray(draw_face(3)).reshape(-1, 3), axis=0))
    assert colours > 100  # flat drawing alone has about ten
    large = np.asarray(draw_face(3, size=128).resize((64, 64)), dtype=float)
    assert np.abs(large - np.asarray(draw_face(3, size=64), dtype=float)).mean() < 6


def test_splits_share_no_face_and_cover_all(faces):
    train, val = ((faces / f"{split}_split.txt").read_text().split() for split in ("train", "val"))
    assert len(train) == 24 and len(val) == 8 and sorted(map(int, train + val)) == list(range(1, 33))


def test_files_of_others_are_not_drawn_over(tmp_path):
    write_dataset(tmp_path / "own", 2, 1, 16)
    write_dataset(tmp_path / "own", 2, 1, 16)  # again, as after an interruption
    for root, spoil in (("splits", lambda path: (path / "val_split.txt").write_text("37\n")),
                        ("photos", lambda path: draw_face(9, 16).save(path / "2.png"))):  # fmt: skip
        (tmp_path / root).mkdir()
        spoil(tmp_path / root)
        before = [path.read_bytes() for path in (tmp_path / root).iterdir()]
        with pytest.raises(UserError, match="would be lost: name another folder"):
            write_dataset(tmp_path / root, 2, 1, 16)
        assert [path.read_bytes() for path in (tmp_path / root).iterdir()] == before
