"""Boxes of neighbouring slices joined to lesions."""

import pytest

from ich_pipeline.box_linking import link_boxes, overlap_of_smaller
from ich_pipeline.detection import ScoredBox


def box(k: int, i0: float, j0: float, size: float = 10, score: float = 0.5, **changes: str) -> ScoredBox:
    given = {"case_id": "a", "subtype": "IPH"} | changes
    return ScoredBox(given["case_id"], k, given["subtype"], i0, j0, i0 + size, j0 + size, score)


def test_boxes_that_overlap_in_neighbouring_slices_are_one_lesion() -> None:
    chain = [box(3, 0, 0), box(4, 5, 0), box(5, 10, 0, score=0.9)]  # the first and the last do not overlap
    apart = [box(4, 40, 40)]
    [one, other] = link_boxes([*chain, *apart])
    assert (one.boxes, one.n_slices, one.score) == (tuple(chain), 3, 0.9)
    assert (other.boxes, other.n_slices) == (tuple(apart), 1)


@pytest.mark.parametrize(
    ("pair", "joined"),
    [
        ((box(3, 0, 0), box(4, 0, 0)), True),
        ((box(3, 0, 0), box(5, 0, 0)), False),  # a slice between
        ((box(3, 0, 0), box(3, 0, 0)), False),  # the same slice
        ((box(3, 0, 0), box(4, 0, 0, case_id="b")), False),
        ((box(3, 0, 0), box(4, 0, 0, subtype="IVH")), True),
        ((box(3, 0, 0), box(4, 7.5, 0)), True),  # a quarter of the smaller
        ((box(3, 0, 0), box(4, 7.6, 0)), False),
        ((box(3, 0, 0, size=40), box(4, 30, 30)), True),  # it tapers off: IoU 1/16
        ((box(3, 0, 0), box(4, -20, -20)), False),
    ],
)
def test_what_belongs_together(pair: tuple[ScoredBox, ScoredBox], joined: bool) -> None:
    assert len(link_boxes(pair)) == 2 - joined
    assert len(link_boxes(pair[::-1])) == 2 - joined


def test_two_boxes_of_a_slice_join_through_a_third() -> None:
    [lesion] = link_boxes([box(3, 0, 0), box(3, 10, 0), box(4, 0, 0, size=20)])
    assert (len(lesion.boxes), lesion.n_slices) == (3, 2)


def test_the_subtype_is_that_of_most_score() -> None:
    boxes = [box(1, 0, 0, score=0.9, subtype="SDH"), *(box(k, 0, 0, score=0.5, subtype="EDH") for k in (2, 3))]
    [lesion] = link_boxes(boxes)
    assert (lesion.subtype, lesion.score) == ("EDH", 0.9)


def test_ghosts_are_dropped_by_their_slices() -> None:
    boxes = [box(1, 0, 0), box(2, 0, 0), box(7, 50, 50, score=0.99)]
    assert [lesion.n_slices for lesion in link_boxes(boxes, min_slices=1)] == [2, 1]
    assert [lesion.n_slices for lesion in link_boxes(boxes, min_slices=2)] == [2]
    assert link_boxes(boxes, min_slices=3) == []


def test_no_boxes_are_no_lesions() -> None:
    assert link_boxes([]) == []


def test_overlap_by_hand() -> None:
    assert overlap_of_smaller(box(0, 0, 0), box(1, 5, 5, size=4)) == 1
    assert overlap_of_smaller(box(0, 0, 0), box(1, 5, 6)) == pytest.approx(0.2)
    assert overlap_of_smaller(box(0, 0, 0), box(1, 10, 0)) == 0
