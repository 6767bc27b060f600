"""The grammar of the toy world, in tables: which words mean the same, and the sentences that are
said of scenes, edits and questions. toy/language.py fills them in.

To teach the toy a new wording, add a line or a word. Half of the texts that training sees are
plain, in few and simple words; the others are as ordinary people speak. Some wordings training
never sees: they are for the benchmark ("other words").
"""

NUMBERS = ("zero", "one", "two", "three", "four")

# of a text that is not plain
MAX_WORDS = 25

# ---------------------------------------------------------------- tables: words

# word -> words that mean the same
SYNONYMS = {
    "circle": ("ball", "disc", "disk", "dot", "sphere", "round shape"),
    "square": ("box", "block", "cube"),
    "triangle": ("wedge", "pyramid"),
    "cross": ("plus", "plus sign", "x"),
    "object": ("shape", "thing", "item"),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "bigger": ("larger",),
    "purple": ("violet",),
    "grey": ("gray",),
    "colour": ("color",),
    "recolour": ("recolor",),
    "background": ("backdrop",),
    "picture": ("image",),
    "centre": ("center", "middle"),
    "above": ("over", "on top of"),
    "below": ("under", "beneath", "underneath"),
    "next to": ("beside", "near", "close to"),
    "between": ("in between",),
    "two": ("2",),
    "three": ("3",),
    "four": ("4",),
}

# Training never says the two words of a pair in one sentence.
APART = (
    ("disc", "beneath"), ("ball", "underneath"), ("box", "over "), ("block", "beside"),
    ("dot", "under "), ("disk", "right of"), ("cube", "left of"), ("wedge", "on top of"),
    ("box", "little"), ("ball", "huge"), ("pyramid", "tiny"), ("plus sign", "big "),
    ("sphere", "violet"), ("dot", "2"), ("disc", "3"), ("disk", "4"), ("block", "2"),
    ("cube", "3"), ("box", "4"), ("wedge", "how many"), ("round shape", "is there"),
    ("cube", "is there"), ("disc", "color"), ("block", "color"), ("sphere", "where"),
    ("ball", "shrink"), ("box", "erase"), ("dot", "another"), ("block", "swap"), ("disk", "turn"),
)

# A form that is listed twice is said more often.
SIDES = {
    "left of": (
        "left of", "left of", "to the left of", "on the left of", "on the left side of",
        "to the left side of", "left from",
    ),
    "right of": (
        "right of", "right of", "to the right of", "on the right of", "on the right side of",
        "to the right side of", "right from",
    ),
    "above": ("above",),
    "below": ("below",),
}
ITS_SIDES = {
    "left of": ("to its left", "on its left", "left of it", "to the left of it"),
    "right of": ("to its right", "on its right", "right of it", "to the right of it"),
    "above": ("above it",),
    "below": ("below it",),
}
PLACES = {
    "top left": "[at|in] the [top|upper] left[ corner|]",
    "top": "at the top",
    "top right": "[at|in] the [top|upper] right[ corner|]",
    "left": "[at|on|on] the left[ side|]",
    "centre": "in the centre",
    "right": "[at|on|on] the right[ side|]",
    "bottom left": "[at|in] the [bottom|lower] left[ corner|]",
    "bottom": "at the bottom",
    "bottom right": "[at|in] the [bottom|lower] right[ corner|]",
}
DIRECTIONS = {"top": "up", "bottom": "down", "left": "left", "right": "right"}

# Words that the functions of toy/language.py say by themselves.
LITTLE_WORDS = (
    "a an the it is are do does any all both everything of them another one more bigger smaller "
    "in corner and next to on at yes no ones"
)

# From ordinary life, and never in a picture.
NEVER_THERE = (
    "apple", "banana", "bird", "boat", "boy", "car", "cat", "chair", "cow", "dog", "flower",
    "girl", "heart", "horse", "house", "moon", "person", "star", "table", "tree",
)


# ---------------------------------------------------------------- tables: sentences

# One sentence a line, [one of|these|], {slots}. In front of a line:
#   =  plain: half of what is trained on
#   *  never trained on
#   ~  a sentence by itself: no "draw", "can you" or "please" around it
BLOCKS = {
    # ---- a thing or two are {a} and {b}; a is {side} of b, and b at the other side, {back}, of a
    "one": """
        = {a}
          [just|only] {a}
          {a}, nothing else
        * only {a}, nothing else
        * {a} and nothing else
        """,
    "several": """
        = {n} {things}
          [just|only] {n} {things}
          {n} {things}, nothing else
        * {things}, {n} of them
        * {things}, just {n}
        """,
    "two": """
          [a pair of|a couple of] {things}
        * just a [pair|couple] of {things}
        """,
    "list": """
        = {head} and {last}
          {head}, {last}
          {head}, {last}
          {head}, and {last}
          {head} with {last}
          {head} and also {last}
          {head}, then {last}
          {head} {last}
          {head} [&|+] {last}
        * {head}, also {last}
        * {head} and then {last}
        """,
    # several of one colour, which the text leaves out; {all}: both, or all
    "one colour": """
          {text}, {all} {colour}
          {text}, {all} of them {colour}
        * {text}, {all} in {colour}
        * {text} and {all} {colour}
        """,
    "total": """
        ~ {n} objects: {text}
        ~ {n} objects, {text}
        *~ there are {n} objects: {text}
        *~ {n} objects, which are {text}
        """,
    # a thing, its colour behind it
    "late colour": """
          {shape} in {colour}
          {shape} that is {colour}
          {shape} that's {colour}
        * {shape} which is {colour}
        * {shape} of the colour {colour}
        """,
    "relation": """
        = {a} {side} {b}
        = {b} {short_back} {a}
        = {b} {back} {a}
        = {b} with {a} {its_side}
        = {a} with {b} {its_back}
          {a} {side} {b}
          {b} {back} {a}
        ~ {a} is {side} {b}
          {a}, {side} {b}
          {b} and {a} {its_side}
          {a} and, {its_back}, {b}
        ~ {b} has {a} {its_side}
        ~ {side} {b} is {a}
        ~ {side} {b} there is {a}
        ~ {side} {b}, {a}
          {a} that is {side} {b}
        * {b} with, {its_side}, {a}
        * {b}, {its_side} {a}
        *~ {side} {b} you can see {a}
        *~ {a} can be seen {side} {b}
        * {a} and then, {its_back}, {b}
        """,
    "left and right": """
          {a} on the left[,| and] {b} on the right
          {a} left, {b} right
          {a} left and {b} right
          {a} on the left side and {b} on the right side
        ~ on the left {a}, on the right {b}
        ~ on the left there is {a}, on the right there is {b}
        ~ left {a}, right {b}
        ~ left: {a}, right: {b}
          {b} on the right, {a} on the left
        *~ on the right {b}, on the left {a}
        * {b} right, {a} left
        *~ on the left is {a} and on the right is {b}
        *~ left side: {a}, right side: {b}
        *~ left there is {a}, right there is {b}
        """,
    "top and bottom": """
          {a} at the top[,| and] {b} at the bottom
          {a} on top, {b} at the bottom
          {a} top, {b} bottom
        ~ at the top {a}, at the bottom {b}
        ~ at the top there is {a}, at the bottom there is {b}
        ~ top: {a}, bottom: {b}
          {b} at the bottom, {a} at the top
        *~ at the bottom {b}, at the top {a}
        * {b} bottom, {a} top
        *~ at the top is {a} and at the bottom is {b}
        *~ on top {a}, at the bottom {b}
        """,
    "beside": """
          {a} next to {b}
          {a} and {b} [next to each other|side by side]
          {a} with {b} next to it
          {a}, next to it {b}
        ~ {a} is next to {b}
        *~ next to {a} is {b}
        * {a} and {b} next to it
        *~ side by side, {a} and {b}
        *~ {a} has {b} next to it
        """,
    "between": """
          {c} between {a} and {b}
          {a} and {b} with {c} between them
        ~ {c} is between {a} and {b}
          {a}, {b} and between them {c}
        *~ between {a} and {b} is {c}
        *~ between {a} and {b} there is {c}
        """,
    "between two": """
          {c} between {things}
          {things} with {c} between them
        ~ {c} is between {things}
        *~ between {things} there is {c}
        *~ between {things} is {c}
        """,
    # of three things, c is in the middle
    "row": """
          {a}, {c}, {b} in a row
          {a}, {c} and {b} in a row
          {a}, {c}, {b} in a row from {start} to {end}
        ~ from {start} to {end}: {a}, {c}, {b}
        ~ from {start} to {end} {a}, {c} and {b}
          {a}, {c} and {b} from {start} to {end}
          {a} {at_start}, {c} in the centre[, and| and|,] {b} {at_end}
        ~ {at_start} {a}, in the centre {c}, {at_end} {b}
          {a} {at_start}, then {c}, then {b} {at_end}
          {c} in the centre, {a} {at_start}[,| and] {b} {at_end}
          {c} with {a} {its_start} and {b} {its_end}
          {c} in the centre with {a} {its_start} and {b} {its_end}
        * {a}, {c} and {b}, seen from {start} to {end}
        *~ in a row: {a}, {c}, {b}
        *~ {at_start} is {a}, in the centre {c} and {at_end} {b}
        """,
    "spot": """
        = {a} {at}
          {a} {at}
          {a}, {at}
        ~ {at} {a}
        ~ {at} there is {a}
        * {a} that is {at}
        *~ {a} is {at}
        """,
    # the same for several things
    "spots": """
          {a} {at}
        ~ {at} {a}
        *~ {a} is {at}
        * {a} that is {at}
        """,
    "first two": """
        = {text}, with {a} {side} {b}
          {text}, {a} is {side} {b}
          {text}, {b} {back} {a}
          {text} where {a} is {side} {b}
        * {text}, and {a} is {side} {b}
        * {text} and {b} {back} {a}
        """,
    "background": """
        = {text}, on a {background} background
        = {text} against a {background} background
        = {text}, on {background}
          {text} on a {background} background
          {text} on {background}
          {text}, {background} background
          {text}, the background is {background}
          {text} in front of a {background} background
          {text}, with a {background} background
        * {text}, background {background}
        * {text}, in front of {background}
        * {text}, and the background is {background}
        * {text}, the background should be {background}
        """,
    "background first": """
          on a {background} background, {text}
          on {background}, {text}
          {background} background, {text}
        * with a {background} background, {text}
        * in front of a {background} background, {text}
        * the background is {background}, {text}
        """,
    "opening": """
        = {text}
        = draw {text}
        = paint {text}
        = show me {text}
        = a picture of {text}
        = an image of {text}
        = there {is} {text}
          please draw {text}
          please show me {text}
          [show|draw me] {text}
          please [draw|paint|make] {text}
          [draw|paint|show me] {text}[,|] please
          {text}[,|] [please|pls|plz]
          [pls|plz] [draw|show me] {text}
          can you draw {text}?
          [can|could] you [draw|paint|show me] {text}?
          [can|could] you please [draw|create|make] {text}?
          i [want|would like|need] {text}
          i'd like {text}
          i want to see {text}
          [give|make] me {text}
          [make|create|sketch] {text}
          [make|draw|paint|create] [me |]a picture [of|with] {text}
          a [drawing|painting|sketch] of {text}
          picture [of|with] {text}
          here {is} {text}
          i see {text}
          let there be {text}
          can i [see|have] {text}?
        * i would like to see {text}
        * could you sketch {text} please?
        * can you make me a drawing of {text}?
        * i need a painting of {text}
        * let me see {text}
        * can i please have a picture of {text}?
        * i want a sketch with {text}
        * there should be {text}
        """,
    # ---- edits: the thing is {it}; {to} and {at} are a spot or the side of another thing
    "recolour": """
        = make {it} {colour}
        = paint {it} {colour}
        = change the colour of {it} to {colour}
          [turn|colour|recolour] {it} {colour}
          recolour {it} in {colour}
          change {it} to {colour}
          change {it} from {old} to {colour}
          give {it} a {colour} colour
          let {it} be {colour}
        ~ {it} should be {colour}
        ~ i want {it} [to be |]{colour}
        ~ [can|could] {it} be {colour}?
        ~ i would like {it} in {colour}
        * paint {it} in {colour}
        * turn {it} to {colour}
        * make {it} from {old} to {colour}
        * make the colour of {it} {colour}
        * turn the colour of {it} to {colour}
        *~ i would like {it} to be {colour}
        *~ the colour of {it} should be {colour}
        """,
    "recolour all": """
        = make {it} {colour}
          [paint|colour|turn|recolour] {it} {colour}
          change {it} to {colour}
          change the colour of {it} to {colour}
        ~ {it} should be {colour}
        ~ i want {it} [in |to be |]{colour}
        * let {it} be {colour}
        * paint {it} in {colour}
        * give {it} a {colour} colour
        *~ i would like {it} to be {colour}
        *~ could {it} be {colour}?
        """,
    # the colour stays
    "reshape": """
        = turn {it} into {new}
          [change|make] {it} into {new}
          make {it} {new}
          change {it} to {new}
          let {it} be {new}
        ~ {it} should be {new}
        * turn {it} to {new}
        * change the shape of {it} to {new}
        *~ i want {it} to be {new}
        *~ could {it} be {new}?
        """,
    "replace": """
        = replace {it} with {new}
        = swap {it} for {new}
          replace {it} by {new}
          [change|turn] {it} into {new}
          exchange {it} for {new}
          [put|draw|use] {new} in place of {it}
          [put|draw|use] {new} instead of {it}
        ~ {new} instead of {it}
        ~ {it} should be {new}
        * change {it} for {new}
        * instead of {it}, draw {new}
        *~ i want {new} instead of {it}
        *~ {new} in place of {it}
        """,
    "remove": """
        = [remove|delete|take away] {it}
          [erase|drop|clear|get rid of] {it}
          take {it} [away|out]
          take {it} out of the picture
          make {it} go away
        ~ i [do not|don't] want {it}
        ~ {it} should go
        ~ the picture without {it}
        * take out {it}
        * let {it} go away
        * get {it} out of the picture
        *~ i want to get rid of {it}
        *~ {it} should go away
        *~ i want the picture without {it}
        """,
    "add": """
        = [add|put] {new}{place}
          [add|place|draw|put|insert|paint] {new}{place}
          [give|draw] me {new}{place}
          also [draw|add] {new}{place}
          add {new}{place} too
        ~ i [want|need] {new}{place}
        ~ there should be {new}{place}
        ~ and {new}{place}
        ~ {new}{place} too
        * also put {new}{place}
        * let there be {new}{place}
        * draw {new}{place} too
        *~ i would like {new}{place}
        *~ i want {new}{place} too
        *~ there should also be {new}{place}
        """,
    "move": """
        = move {it} {to}
          [put|place|shift|bring|move] {it} {to}
          put {it} {at}
          [put|place] {it} {at}
          let {it} be {at}
        ~ {it} should be {at}
        ~ {it} should go {to}
        ~ i want {it} {at}
        * drag {it} {to}
        * let {it} go {to}
        * change the place of {it}: {at}
        *~ {it} {at}
        *~ i would like {it} to be {at}
        *~ could {it} be {at}?
        """,
    "push": """
          [move|shift|push|drag] {it} {direction}
          move {it} a bit {direction}
        ~ {it} should go {direction}
        * bring {it} {direction}
        * push {it} a bit {direction}
        * let {it} go {direction}
        *~ i want {it} to go {direction}
        """,
    "swap": """
        = swap {it} and {other}
          [swap|switch|exchange] {it} and {other}
          [swap|switch] {it} with {other}
          [swap|exchange] the places of {it} and {other}
          let {it} and {other} change places
        ~ {it} and {other} should [change|swap] places
        * exchange {it} with {other}
        * change the places of {it} and {other}
        * let {it} and {other} swap places
        *~ i want to swap {it} and {other}
        """,
    "swap both": """
          [swap|switch|exchange] [the two objects|both objects|the objects|them]
          let the two objects change places
        * let them change places
        * swap the places of the two objects
        """,
    # {size}: bigger, or large
    "resize": """
        = make {it} {size}
          make {it} {size}
          let {it} be {size}
          change the size of {it} to {size}
          draw {it} {size}
        ~ {it} should be {size}
        ~ i want {it} [to be |]{size}
        ~ can {it} be {size}?
        * paint {it} {size}
        * change {it} to {size}
        * make the size of {it} {size}
        *~ i would like {it} [to be |]{size}
        *~ could {it} be {size}?
        """,
    "enlarge": """
        = enlarge {it}
          [enlarge|grow|scale up] {it}
          make {it} [a bit|much] bigger
          let {it} grow
        * scale {it} up
        * enlarge {it} a bit
        *~ {it} should grow
        """,
    "shrink": """
        = shrink {it}
          [shrink|reduce|scale down] {it}
          make {it} [a bit|much] smaller
          let {it} shrink
        * scale {it} down
        * shrink {it} a bit
        *~ {it} should shrink
        """,
    "repaint": """
        = make the background {colour}
        = change the background to {colour}
        = put it on a {colour} background
          [turn|paint|colour] the background {colour}
          change the colour of the background to {colour}
          [use|give it] a {colour} background
        ~ the background should be {colour}
        ~ {colour} background
        ~ i want a {colour} background
        * let the background be {colour}
        * turn the background to {colour}
        * change to a {colour} background
        * put a {colour} background
        *~ i would like a {colour} background
        *~ i want the background to be {colour}
        """,
    "please": """
          {text}[,|] please
          please {text}
          {text}[,|] [pls|plz]
          pls {text}
          [can|could] you {text}?
          [can|could] you please {text}?
          i want you to {text}
          now {text}
        * please can you {text}?
        * i would like you to {text}
        * now please {text}
        """,
    # ---- questions
    "colour": """
        = what colour {is} {it}?
          what is the colour of {it}?
          which colour {is} {it}?
          what's the colour of {it}?
          which colour {does} {it} have?
          what colour {does} {it} have?
          {it} {is} what colour?
          colour of {it}?
          tell me the colour of {it}
        * which is the colour of {it}?
        * can you tell me the colour of {it}?
        * tell me what colour {it} {is}
        """,
    "shape": """
        = what shape is {it}?
        = what is the shape of {it}?
          which shape is {it}?
          which shape does {it} have?
          {it} is what shape?
          shape of {it}?
          tell me the shape of {it}
        * what shape does {it} have?
        * which is the shape of {it}?
        * can you tell me the shape of {it}?
        * tell me what shape {it} is
        """,
    "which": """
        = which object is {that}?
          which one is {that}?
          which of the objects is {that}?
          which is the object that is {that}?
          tell me which object is {that}
        * which is the one that is {that}?
        * tell me which one is {that}
        * which of them is {that}?
        * can you tell me which object is {that}?
        """,
    "what": """
        = what is {that}?
          what's {that}?
          what do you see {that}?
          what can you see {that}?
          what can be seen {that}?
          tell me what is {that}
          {that} is what?
        * what is there {that}?
        * what can i see {that}?
        * can you tell me what is {that}?
        * {that} there is what?
        * tell me what you see {that}
        """,
    "count": """
        = how many {things} are there?
        = how many {things}?
          how many {things} do you see?
          how many {things} can you [see|count]?
          how many {things} are there in [total|all]?
          how many {things} are in the picture?
          how many {things} in the picture?
          how many {things} altogether?
          how many {things} are there altogether?
          number of {things}?
          how many {things} can be seen?
          how many {things} does the picture have?
          count the {things}
          what is the number of {things}?
          what's the number of {things}?
          tell me how many {things} there are
        * how many {things} can be seen here?
        * how many {things} are to be seen?
        * how many {things} are there in the picture?
        * how many {things} do you count?
        * can you count the {things}?
        * tell me the number of {things}
        """,
    "where": """
        = where is {it}?
          where's {it}?
          where do you see {it}?
          where in the picture is {it}?
          where can {it} be seen?
          what is the place of {it}?
          tell me where {it} is
        * where can you see {it}?
        * where can i see {it}?
        * {it} is where?
        * can you tell me where {it} is?
        * where in the picture do you see {it}?
        """,
    "exists": """
        = {is} there {a}?
          do you see {a}?
          can you see {a}?
          {is} there {a} in the picture?
          {is} {a} in the picture?
          does the picture have {a}?
          can {a} be seen?
        * {is} {a} there?
        * do you see {a} in the picture?
        * in the picture, {is} there {a}?
        * can i see {a}?
        * can {a} be seen in the picture?
        """,
    # {what}: blue; a square; left of the square
    "yes or no": """
        = {is} {it} {what}?
          {is} it true that {it} {is} {what}?
          yes or no: {is} {it} {what}?
          {it} {is} {what}, yes or no?
          tell me, {is} {it} {what}?
        * {it} {is} {what}?
        * is it true: {it} {is} {what}?
        * {is} {it} {what}, yes or no?
        * {it} {is} {what}, is it true?
        """,
    # of two things; {what}: colour or shape
    "same": """
          are [both|they|the two objects|both objects] [of |]the same {what}?
          do [both|they|the two objects|both objects] have the same {what}?
          is their {what} the same?
        * is it the same {what} for both?
        * is the {what} of both the same?
        """,
    "describe": """
        = describe the picture
        = what is in the picture?
          what do you see?
          what can you see?
          what do you see in the picture?
          can you describe the picture?
          what is this?
          what is shown here?
          describe what you see
          describe this picture
          tell me what is in the picture
        * what is shown in the picture?
        * tell me what you see
        * what do you see here?
        * what can you see here?
        """,
}
