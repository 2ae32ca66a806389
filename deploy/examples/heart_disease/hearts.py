"""Heart disease at four hospitals: the application that every site runs.

An application has a `model`, the same at every site, and `data`, which never leaves its own.
"""

import csv
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
PATIENTS = Path(__file__).with_name("heart_disease_uci.csv")
NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak", "ca")
CATEGORIES = {
    "sex": ("Male",),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": ("TRUE",),
    "restecg": ("normal", "lv hypertrophy", "st-t abnormality"),
    "exang": ("TRUE",),
    "slope": ("upsloping", "flat", "downsloping"),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
OFTEN_UNKNOWN = ("chol", "ca", "slope", "thal", "fbs", "exang")
FEATURES = len(NUMBERS) + sum(map(len, CATEGORIES.values())) + len(OFTEN_UNKNOWN)


class Hearts:
    def model(self) -> keras.Model:
        layers = [
            keras.Input((FEATURES,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy", metrics=["accuracy"])
        return model

    def data(self, hospital: str) -> dict[str, tuple[Floats, Floats]]:
        with PATIENTS.open(newline="") as file:
            patients = [row for row in csv.DictReader(file) if row["dataset"] == hospital]
        if not patients:
            raise ValueError(f"{PATIENTS.name} has no patients of {hospital!r}")
        x = np.array([features(patient) for patient in patients], np.float32)
        y = np.array([patient["num"] != "0" for patient in patients], np.float32)
        rows = split(y)
        x = standardised(x, x[rows["train"]])
        return {name: (x[part], y[part]) for name, part in rows.items()}


def features(patient: dict[str, str]) -> list[float]:
    """Numbers (NaN: unknown), one column for each category, and what is unknown."""
    known = {name: text for name, text in patient.items() if text}
    if known.get("chol") == "0":  # nobody's; at one hospital it stands for unknown
        del known["chol"]
    numbers = [float(known.get(name, "nan")) for name in NUMBERS]
    categories = [known.get(name) == value for name, all_ in CATEGORIES.items() for value in all_]
    return [*numbers, *categories, *(name not in known for name in OFTEN_UNKNOWN)]


def split(y: Floats) -> dict[str, NDArray[np.intp]]:
    """Rows for training (60 %), validation (15 %) and test (25 %), always the same.

    Each has its share of the ill and of the healthy.
    """
    shuffle = np.random.default_rng(1988)
    parts: dict[str, list[NDArray[np.intp]]] = {"train": [], "validation": [], "test": []}
    for ill in (0, 1):
        rows = shuffle.permutation(np.flatnonzero(y == ill))
        ends = [round(0.6 * len(rows)), round(0.75 * len(rows))]
        for part, some in zip(parts.values(), np.split(rows, ends), strict=True):
            part.append(some)
    return {name: np.concatenate(part) for name, part in parts.items()}


def standardised(x: Floats, train: Floats) -> Floats:
    """Numbers with mean 0 and deviation 1 over this site's training rows; unknown ones become 0."""
    numbers, others = x[:, : len(NUMBERS)], x[:, len(NUMBERS) :]
    seen = train[:, : len(NUMBERS)]
    count = np.maximum(np.isfinite(seen).sum(axis=0), 1)  # a site may know nothing of a column
    mean = np.nan_to_num(seen).sum(axis=0) / count
    deviation = np.sqrt((np.nan_to_num(seen - mean) ** 2).sum(axis=0) / count)
    scaled = (numbers - mean) / np.where(deviation > 0, deviation, 1)
    return np.hstack([np.nan_to_num(scaled), others]).astype(np.float32)
