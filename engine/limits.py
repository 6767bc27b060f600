"""Limits on what comes from outside: options, files, records. Each is far above what anybody needs
and far below what exhausts a machine. Nearly all of them stand here; whoever needs more changes a
number.
"""

# ------------------------------------------------------------------------------------- options

# Pictures that one command draws (--n).
MAX_PICTURES = 1000
# Steps of the sampler. The network is given time in whole thousandths: more say nothing new.
MAX_STEPS = 1000
# Whatever else counts pictures, examples or steps.
MAX_COUNT = 10 ** 9
# Steps of a training run: the names of checkpoints have eight digits.
MAX_TRAINING_STEPS = 99_999_999
# Side of a picture that is drawn or learnt from, in pixels.
MAX_SIZE = 8192
# No seed is above this. (The seed of picture i is --seed + i, and torch takes 64 bits.)
MAX_SEED = 2 ** 62
# Factors: guidance, shift. Far beyond what any of them does in practice.
MAX_FACTOR = 1000.0
# Learning rate and weight decay.
MAX_RATE = 100.0
# Bytes of a prompt, a question or a caption, as UTF-8.
MAX_CAPTION_BYTES = 64 * 1024
# Processes beside this one that read data.
MAX_WORKERS = 256
# Files that one pattern such as 'a-{000..123}.tar' may name.
MAX_SHARDS = 100_000

# ---------------------------------------------------------------------------------------- data

# Of a picture that is read: 8000 x 8000, more than a camera of 60 megapixels gives. Decoded, it has
# 4 bytes a pixel, and 12 for a moment where it is transparent.
MAX_PIXELS = 64_000_000
# Of a picture that is read, as a file or a member of a tar.
MAX_PICTURE_BYTES = 256 * 1024 * 1024
# Of the colour profile in a picture; those of printers have 1 to 3 MB.
MAX_PROFILE_BYTES = 4 * 1024 * 1024
# Of a record in metadata.jsonl or metadata.csv.
MAX_LINE_BYTES = 1024 * 1024
# Of what describes one member of a tar: its name, its owner, ...
MAX_TAR_HEADER_BYTES = 1024 * 1024
# Pictures that one record refers to, together of at most MAX_PIXELS, or one command (--image).
MAX_SOURCES = 16
# Members of a tar that share a key: a record's pictures and text, and what is not read of it.
MAX_RECORD_MEMBERS = 64
# Side of a picture to learn to draw. Below, it is a placeholder or what a failed download left.
MIN_TARGET_SIDE = 8

# ------------------------------------------------------------------------------- the live page

# Of a prompt or a question, as UTF-8: a question is read whole, whatever that costs.
MAX_PAGE_TEXT_BYTES = 4096
# Steps of a drawing: everybody else waits for them.
MAX_PAGE_STEPS = 200
# Where the page begins (--seed): JavaScript has whole numbers up to here.
MAX_PAGE_SEED = 2 ** 53 - 1
# Of a picture that is given, and of a request; in base64 a picture is a third larger. (The page
# itself makes larger pictures smaller.)
MAX_PAGE_PIXELS = 16_000_000
MAX_PAGE_REQUEST_BYTES = 12 * 1024 * 1024
# Of all requests that are read or wait, together.
MAX_PAGE_HELD_BYTES = 256 * 1024 * 1024
# Requests that wait, and connections, whatever they do.
MAX_PAGE_WAITING = 128
MAX_PAGE_CONNECTIONS = 256
# Seconds for a request to arrive as a whole, and for a client to take what is sent to it.
MAX_PAGE_READ_SECONDS = 20
MAX_PAGE_WRITE_SECONDS = 10

# --------------------------------------------------------------------------------------- files

# Of a JSON file, such as config.json or an index of weights. (tokenizer.json has its own.)
MAX_JSON_BYTES = 16 * 1024 * 1024
# Of words.txt, one word a line.
MAX_WORDS_BYTES = MAX_JSON_BYTES
MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
# Of the header of a safetensors file: its tensors' names, kinds and shapes.
MAX_HEADER_BYTES = MAX_JSON_BYTES
# Brackets within brackets in JSON: Python's own reader recurses.
MAX_JSON_DEPTH = 64
# Characters of a name from a file, or of its content, that a message repeats.
MAX_NAME_CHARACTERS = 200

# -------------------------------------------------------------------------------------- config

# Layers of one network, and the width of one of its layers.
MAX_LAYERS = 1000
MAX_WIDTH = 1_000_000
# Entries of a vocabulary, tokens of a sequence.
MAX_VOCABULARY = 10_000_000
MAX_TOKENS = 1_000_000
# Queries of the ladder.
MAX_QUERIES = 10_000

# --------------------------------------------------------------------------------------- state

# Processes of a run, and how often their number may have changed (see data.Share).
MAX_PROCESSES = 100_000
MAX_HISTORY = 10_000
