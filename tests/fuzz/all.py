"""All cases, by area. FAST: those of the gate."""
from tests.fuzz import commands, data, models, runs

AREAS = {
    "config": models.config_cases,
    "files": models.file_cases,
    "weights": models.weight_cases,
    "tokenizer": models.tokenizer_cases,
    "public configs": models.public_cases,
    "conversion": models.conversion_cases,
    "numbers": commands.number_cases,
    "options": commands.option_cases,
    "places": commands.place_cases,
    "pictures": commands.picture_cases,
    "runs": commands.run_cases,
    "other scripts": commands.other_cases,
    "curves": commands.curve_cases,
    "resume": runs.resume_cases,
    "data": data.data_cases,
}
# Areas of which every n-th case is in the gate. n has no factor in common with the number of values
# that an area tries in each place: else the same ones would be left out everywhere.
EVERY = {"config": 7, "public configs": 12, "numbers": 7, "resume": 8, "runs": 3, "places": 3,
         "pictures": 3, "data": 3, "options": 3, "curves": 2}


def prepare() -> None:
    """What the cases share, before the first of them."""
    runs.finished()


def fast(area: str) -> list:
    return list(AREAS[area]())[::EVERY.get(area, 1)]
