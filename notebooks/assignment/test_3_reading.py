"""Part 3: positions in text and pictures, and windows of a picture."""
import math

from notebooks.assignment.grading import check_shape, problem, two

PICTURE = 9          # the image token here
POSITIONS = dict(
    plain_text="A picture's tokens do not count up one by one: each has its row and its column.",
    time_runs="A picture stands still in time: the first axis has one number for all its tokens.",
    rows_columns_swapped="Second axis: the row (height). Third axis: the column (width). Yours "
                         "are swapped. (A grid is (h, w), and its tokens go row by row.)",
    not_moved="The picture's rows and columns begin at the position where the picture begins. "
              "Yours begin at 0.",
    only_time_moved="A picture's rows and columns count from p on, too: (p, p + y, p + x). Yours "
                    "are (p, y, x).",
    after_all_tokens="After a picture, counting goes on from the largest position so far + 1, "
                     "which is max(h, w) above the picture's start. Yours goes h * w further.",
    after_rows_only="After a picture, counting goes on from the largest position so far + 1: "
                    "max(h, w), not h.",
    no_plus_one="After a picture, counting goes on from the largest position so far + 1. Yours "
                "gives that largest position twice.",
)


@problem(3, **POSITIONS)
def test_3a_one_picture(adapters, case):
    ids = [1, 2, 3] + [PICTURE] * 8 + [4, 5, 6]
    return {
        "text only": adapters.mrope_positions([1, 2, 3, 4], PICTURE, []),
        "a picture of 2 x 4": adapters.mrope_positions(ids, PICTURE, [(2, 4)]),
    }


@problem(
    3,
    **POSITIONS,
    second_by_index="The second picture begins at the position reached so far, not at the index of "
                    "its first token: a picture has fewer positions than tokens.",
    first_grid_twice="The second picture has a grid of its own. Yours has the first one's.",
    after_columns_only="After a picture, counting goes on from the largest position so far + 1: "
                       "max(h, w), not w.",
    run_as_one="A run of image tokens may be several pictures: its grid says where one ends. Yours "
               "takes the whole run for one.",
)
def test_3b_two_pictures(adapters, case):
    ids = [1, 2] + [PICTURE] * 8 + [3, 4] + [PICTURE] * 6 + [5, 6]
    beside = [1] + [PICTURE] * 10 + [2]
    return {
        "4 x 2 and 2 x 3": adapters.mrope_positions(ids, PICTURE, [(4, 2), (2, 3)]),
        "two side by side": adapters.mrope_positions(beside, PICTURE, [(2, 2), (3, 2)]),
    }


# h, w, side. The last one refuses a number of windows that is right for side 2 alone.
PICTURES = {"4 x 6": (4, 6, 2), "3 x 5": (3, 5, 2), "4 x 5, side 3": (4, 5, 3)}


@problem(
    4,
    runs_of_units="A window is a square: `side` units of each of `side` rows. Yours takes "
                  "side * side units in a row.",
    columns_first="The windows go row by row: after the first comes the one to its right. Yours go "
                  "down first.",
    inside_transposed="Inside of a window the units go row by row. Yours go column by column.",
    all_transposed="Windows go row by row, and inside of each its units do. In yours both go "
                   "column by column.",
    filled_at_the_start="What an edge window lacks is filled at the right and at the bottom. Yours "
                        "is filled at the left and at the top.",
    all_valid="`valid` is False where an edge window reaches beyond the picture. Yours is True "
              "everywhere, and attention would read what is not there.",
    width_height_swapped="x goes row by row, w units in each row: x.view(h, w, n). Yours is "
                         "x.view(w, h, n).",
)
def test_3c_to_windows(adapters, case):
    found = {}
    for name, (h, w, side) in PICTURES.items():
        made = adapters.to_windows(case[name], h, w, side)
        windows, valid = two(made, f"3c to_windows, {name}", "windows and valid")
        n = math.ceil(h / side) * math.ceil(w / side)
        check_shape(windows, (n, side ** 2, 5), f"3c to_windows, windows, {name}")
        check_shape(valid, (n, side ** 2), f"3c to_windows, valid, {name}")
        found[f"valid, {name}"] = valid
        # What fills an edge window is up to you.
        found[f"windows, {name}"] = windows.masked_fill(~valid.bool()[:, :, None], 0)
    return found


@problem(
    4,
    left_in_windows="They still go window by window: put each unit back into its row.",
    columns_first="The windows go row by row, so the second one stands to the right of the first, "
                  "not below it.",
    inside_transposed="Inside of a window the units go row by row.",
    filler_kept="What filled the edge windows is still there: leave it out, then h * w units "
                "remain.",
    never_moved="The windows are still windows: move axes first. Yours flattens them and takes the "
                "first h * w.",
    cut_after="Crop to h rows and w columns before you flatten. Yours flattens, and then takes the "
              "first h * w units.",
    filled_at_the_start="What filled the edge windows is at their right and bottom. Yours cuts the "
                        "left and the top.",
)
def test_3d_from_windows(adapters, case):
    return {name: adapters.from_windows(case[f"windows of {name}"], h, w, side)
            for name, (h, w, side) in PICTURES.items()}
