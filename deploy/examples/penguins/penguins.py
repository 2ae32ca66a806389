"""Penguins on three islands, none of which has all three species."""

import csv
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

PENGUINS = Path(__file__).with_name("penguins.csv")
SPECIES = ("Adelie", "Chinstrap", "Gentoo")
# Fixed scales, the same everywhere: an island's own mean would hide which species lives there.
SCALES = {
    "bill_length_mm": (44.0, 5.5),
    "bill_depth_mm": (17.0, 2.0),
    "flipper_length_mm": (200.0, 14.0),
    "body_mass_g": (4200.0, 800.0),
}


class Penguins:
    def model(self) -> keras.Model:
        layers = [
            keras.Input((len(SCALES),)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(len(SPECIES), activation="softmax"),
        ]
        model = keras.Sequential(layers)
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    def data(self, island: str) -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
        with PENGUINS.open(newline="") as file:
            birds = [row for row in csv.DictReader(file) if row["island"] == island]
        birds = [bird for bird in birds if "NA" not in [bird[name] for name in SCALES]]
        if not birds:
            raise ValueError(f"{PENGUINS.name} has no penguins on {island!r}")
        x = np.array([measures(bird) for bird in birds], np.float32)
        y = np.array([SPECIES.index(bird["species"]) for bird in birds])
        order = np.random.default_rng(2007).permutation(len(birds))
        parts = np.split(order, [round(0.6 * len(birds)), round(0.75 * len(birds))])
        return {
            name: (x[part], y[part])
            for name, part in zip(("train", "validation", "test"), parts, strict=True)
        }


def measures(bird: dict[str, str]) -> list[float]:
    return [(float(bird[name]) - middle) / spread for name, (middle, spread) in SCALES.items()]
