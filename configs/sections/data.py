"""The training and validation data: where it is, how examples are read, cut and packed."""

from __future__ import annotations

from typing import Literal

from regrow.configs.sections.section import Count, NotNegative, Section, Texts, Whole

DatasetType = Literal["alpaca", "chat_template", "completion"]
FileType = Literal["json", "csv", "parquet", "arrow", "text"]
CHAT_TEMPLATES = ("alpaca", "chatml", "gemma", "llama3", "mistral", "phi_3")
"""Templates known by name; a test holds them to those that `prepare` has."""

TrainOnEnd = Literal["turn", "all", "last", "none"]


class Dataset(Section):
    """One source of examples."""

    path: str
    """Hub id, file, directory or URL (`s3://`, `gs://`, `https://`, ...) of the data; or a file
    type (`json`, `csv`, ...) with the files in `data_files`."""

    type: DatasetType
    """How a row becomes an example. `alpaca`: instruction, input and output columns;
    `chat_template`: a list of messages; `completion`: plain text, all of it trained on."""

    name: str | None = None
    """Configuration of a hub dataset. Default: its only or default one."""

    split: str = "train"
    """Split to read, with an optional slice: `train`, `train[:10%]`, `train[:500]`. Default
    `train`, as Axolotl does."""

    data_files: Texts = ()
    """Files to read, relative to `path`. Default: all that belong to the split."""

    ds_type: FileType | None = None
    """File type where the file name does not say it: json (also JSON lines), csv, parquet, arrow,
    text. Default: from the file name."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset. Default: the newest commit, whose hash is
    recorded."""

    trust_remote_code: bool = False
    """Accepted when false: dataset scripts are never run."""

    shards: Count | None = None
    """Split the rows into this many parts and use one of them. Default: all rows."""

    shards_idx: Whole | None = None
    """Which of the `shards` parts, from 0. Default 0 when `shards` is given."""

    field: str = "text"
    """Column with the text, for `type: completion`. Default `text`, as Axolotl does."""

    field_instruction: str = "instruction"
    """Column with the instruction, for `type: alpaca`. Default: the name in the Alpaca data."""

    field_input: str = "input"
    """Column with the further input, for `type: alpaca`; may be absent or empty. Default: the name
    in the Alpaca data."""

    field_output: str = "output"
    """Column with the answer, for `type: alpaca`. Default: the name in the Alpaca data."""

    field_messages: str = "messages"
    """Column with the list of messages, for `type: chat_template`. Default `messages`, as Axolotl
    does."""

    message_property_mappings: dict[str, str] = {"role": "role", "content": "content"}
    """Name the chat template uses -> name in the data. Default: `role` and `content` themselves."""

    roles: dict[str, Texts] | None = None
    """Role the chat template knows -> names of it in the data. Default, as Axolotl does: user:
    human, user; assistant: gpt, assistant; system: system; tool: tool."""

    roles_to_train: Texts = ("assistant",)
    """Roles whose messages are trained on. Default: the assistant's, as Axolotl does."""

    train_on_inputs: bool | None = None
    """Train on all messages, not only on `roles_to_train` (or on the prompt, for `type: alpaca`).
    Default: the recipe's `train_on_inputs`."""

    train_on_eos: TrainOnEnd = "turn"
    """Which end-of-text tokens are trained on. `turn`: those that end a trained turn; `all`;
    `last`: only the last of the conversation; `none`. Default `turn`, as Axolotl does."""

    train_on_eot: TrainOnEnd | None = None
    """The same for the end-of-turn tokens in `eot_tokens`. Default: as `train_on_eos`."""

    chat_template: str | None = None
    """Chat template for this dataset; see the recipe's `chat_template`, which is the default."""

    chat_template_jinja: str | None = None
    """Jinja text, or a path to a file of it, for `chat_template: jinja`."""


class DataSection(Section):
    """What the model is trained and validated on."""

    datasets: tuple[Dataset, ...]
    """Sources of training examples, used together."""

    test_datasets: tuple[Dataset, ...] = ()
    """Sources of validation examples. Default: none; `val_set_size` can hold some back instead."""

    val_set_size: NotNegative | Count = 0
    """Examples held back for validation: a fraction when below 1, else a number of examples.
    Default 0 (none), as Axolotl does."""

    sequence_len: Count = 512
    """Longest row in tokens. Default 512, Axolotl's."""

    excess_length_strategy: Literal["drop", "truncate", "raise", "split"] = "drop"
    """What happens to an example longer than `sequence_len`: drop it, truncate it, raise an error,
    or split it into several. Default `drop`, as Axolotl does; dropped examples are counted."""

    min_sample_len: Count | None = None
    """Drop examples of fewer tokens. Default: none is too short."""

    sample_packing: bool = False
    """Put several examples into one row, attention kept inside each. Default false, Axolotl's."""

    eval_sample_packing: bool | None = None
    """The same for validation rows. Default: as `sample_packing`."""

    pad_to_sequence_len: bool = False
    """Pad every row to `sequence_len`. The result is the same; shapes stay constant. Default false:
    padding costs time."""

    shuffle_merged_datasets: bool = True
    """Mix the examples of all `datasets`. Default true, Axolotl's."""

    dataset_exact_deduplication: bool = False
    """Keep only the first of identical examples. Default false, Axolotl's."""

    dataset_num_proc: Count | None = None
    """Processes that tokenize. Never changes the result. Default: one for each CPU core."""

    chat_template: str | None = None
    """How messages become text. `tokenizer_default`: the tokenizer's own template;
    `tokenizer_default_fallback_<name>`: that, or the named one where it has none; `jinja`: the text
    in `chat_template_jinja`; or alpaca, chatml, gemma, llama3, mistral, phi_3. Default
    `tokenizer_default`."""

    chat_template_jinja: str | None = None
    """Jinja text, or a path to a file of it, for `chat_template: jinja`."""

    eot_tokens: tuple[str, ...] = ()
    """Tokens that end a turn. Default: the tokenizer's `eos_token`."""

    train_on_inputs: bool = False
    """Train on prompts as well as on answers. Default false, Axolotl's."""
