"""Names and special values that LLaVA's prompts, labels and scripts agree on. Values are LLaVA's; nothing
is computed here.
"""

CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
WORKER_HEART_BEAT_INTERVAL = 15  # seconds
LOGDIR = "."

# Label value that the loss ignores.
IGNORE_INDEX = -100
# Placeholder id in `input_ids`; never a row of the embedding table, replaced by the visual tokens of one
# image.
IMAGE_TOKEN_INDEX = -200

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
# Stands for the image in templates that are filled in later (with or without start/end tokens).
IMAGE_PLACEHOLDER = "<image-placeholder>"
