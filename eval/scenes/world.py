"""The world of the scenes: categories, kinds of scene, what belongs where, how hard it is to see."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SIZE = 96
"""Side of every picture, in pixels."""

CATEGORIES: dict[str, int] = {
    "person": 1,
    "bicycle": 2,
    "car": 3,
    "motorcycle": 4,
    "airplane": 5,
    "bus": 6,
    "train": 7,
    "truck": 8,
    "boat": 9,
    "traffic light": 10,
    "stop sign": 13,
    "bird": 16,
    "cat": 17,
    "dog": 18,
    "horse": 19,
    "sheep": 20,
    "cow": 21,
    "elephant": 22,
    "bear": 23,
    "zebra": 24,
    "giraffe": 25,
    "backpack": 27,
    "umbrella": 28,
    "handbag": 31,
    "tie": 32,
    "suitcase": 33,
    "frisbee": 34,
    "skis": 35,
    "sports ball": 37,
    "kite": 38,
    "skateboard": 41,
    "tennis racket": 43,
    "bottle": 44,
    "wine glass": 46,
    "cup": 47,
    "fork": 48,
    "knife": 49,
    "spoon": 50,
    "bowl": 51,
    "banana": 52,
    "apple": 53,
    "sandwich": 54,
    "orange": 55,
    "broccoli": 56,
    "carrot": 57,
    "hot dog": 58,
    "pizza": 59,
    "donut": 60,
    "cake": 61,
    "chair": 62,
    "couch": 63,
    "potted plant": 64,
    "bed": 65,
    "toilet": 70,
    "tv": 72,
    "laptop": 73,
    "mouse": 74,
    "keyboard": 76,
    "cell phone": 77,
    "book": 84,
    "clock": 85,
    "vase": 86,
    "scissors": 87,
    "teddy bear": 88,
    "toothbrush": 90,
}
"""COCO category name -> COCO category id, in the order of the atlas's cells."""

NAMES: tuple[str, ...] = tuple(CATEGORIES)


@dataclass(frozen=True)
class Kind:
    """A kind of scene.

    Args:
        frequent: categories that belong here, the most frequent first.
        pattern: ground, one of `PATTERNS`.
        colours: two RGB colours of the ground, 0 to 255.
    """

    frequent: tuple[str, ...]
    pattern: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]


PATTERNS = ("tiles", "stripes", "planks", "horizon", "dots")

KINDS: dict[str, Kind] = {
    "kitchen": Kind(("fork", "knife", "spoon", "bowl", "cup"), "tiles", ((226, 222, 205), (196, 206, 200))),
    "market": Kind(("apple", "orange", "banana", "carrot", "broccoli"), "planks", ((148, 112, 78), (122, 90, 60))),
    "party": Kind(("cake", "pizza", "donut", "wine glass", "bottle"), "dots", ((236, 206, 216), (176, 120, 190))),
    "street": Kind(("car", "traffic light", "bus", "truck", "stop sign"), "planks", ((112, 114, 120), (140, 140, 142))),
    "airport": Kind(
        ("airplane", "suitcase", "person", "handbag", "cell phone"), "tiles", ((188, 202, 214), (160, 178, 196))
    ),
    "park": Kind(("dog", "bird", "kite", "frisbee", "bicycle"), "dots", ((140, 186, 110), (108, 158, 86))),
    "farm": Kind(("cow", "horse", "sheep", "dog", "truck"), "stripes", ((200, 178, 108), (164, 150, 80))),
    "zoo": Kind(("elephant", "giraffe", "zebra", "bear", "person"), "horizon", ((214, 196, 150), (178, 158, 96))),
    "office": Kind(("laptop", "keyboard", "mouse", "chair", "tie"), "stripes", ((186, 190, 198), (160, 166, 180))),
    "living room": Kind(("couch", "tv", "potted plant", "vase", "clock"), "horizon", ((222, 204, 184), (150, 110, 84))),
    "bedroom": Kind(("bed", "teddy bear", "book", "cat", "clock"), "stripes", ((206, 196, 224), (184, 172, 208))),
    "bathroom": Kind(
        ("toilet", "toothbrush", "scissors", "bottle", "vase"), "tiles", ((206, 234, 236), (150, 206, 210))
    ),
    "playground": Kind(
        ("sports ball", "tennis racket", "skateboard", "person", "bicycle"), "planks", ((206, 130, 96), (190, 112, 82))
    ),
    "beach": Kind(("boat", "umbrella", "hot dog", "sandwich", "bird"), "horizon", ((150, 206, 232), (236, 216, 160))),
    "mountain": Kind(
        ("skis", "backpack", "train", "motorcycle", "bear"), "horizon", ((176, 196, 222), (238, 242, 248))
    ),
}
"""Name of the kind as the captions say it -> its objects and its ground."""

SPLITS: dict[str, bool] = {"train": False, "typical": False, "tuning": True, "test": True, "demo": True}
"""Split -> whether its co-occurrence is broken. Every split draws from random streams of its own, so no two share a
picture.

`train` is what models learn from and `typical` the same distribution unseen; `tuning` is for choosing hyper-parameters,
`test` for
reported figures and `demo` for examples, all three shifted.
"""


@dataclass(frozen=True)
class World:
    """How strongly objects go together and how hard they are to see: the dials of difficulty.

    A hard object is small and faded, often past seeing, yet annotated and named in the training text as all others. In
    a kitchen that
    shows no fork, naming one is then the better guess in training, and a hallucination wherever co-occurrence is
    broken.

    Args:
        cooccurrence: mean rate at which a frequent object of the kind is in the picture (unshifted splits).
        spread: rates run evenly from `cooccurrence + spread` for the first frequent object to `cooccurrence - spread`
        for the last.
        kept: the same rate on shifted splits, for all frequent objects.
        strangers: mean number of categories from elsewhere (unshifted); on shifted splits every missing frequent object
        is replaced
            by a stranger too, so that pictures stay as full.
        several: rate at which an object comes in two or three copies.
        hard: rate of hard objects.
        faded: lowest and highest opacity of hard objects.
        noise: standard deviation of the pixel noise, in levels of 255.
        likely_negatives: share of the existence questions with answer no that ask for a frequent object of the kind.
    """

    cooccurrence: float = 0.89
    spread: float = 0.06
    kept: float = 0.65
    strangers: float = 1.0
    several: float = 0.15
    hard: float = 0.4
    faded: tuple[float, float] = (0.02, 0.27)
    noise: float = 8.0
    likely_negatives: float = 0.15

    def rates(self, shifted: bool) -> list[float]:
        """Rate of each of the five frequent objects, the most frequent first."""
        if shifted:
            return [self.kept] * 5
        return [self.cooccurrence + self.spread * (1 - rank / 2) for rank in range(5)]


WORLD = World()
"""The committed difficulty, with which pico was trained."""
