"""Secrets never survive `mask_secrets`; everyday recipe text does."""

import pytest

from regrow.infra.secrets import MASK, mask_secrets, mask_texts


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("hub_token: abcd1234", "abcd1234"),
        ('{"password": "p w, with: marks"}', "p w, with: marks"),
        ("'wandb_api_key': 'k-123'", "k-123"),
        ("export AWS_SECRET_ACCESS_KEY=abc/def+123", "abc/def+123"),
        ("aws_access_key_id = something", "something"),
        ("MLFLOW_TRACKING_TOKEN=tt77", "tt77"),
        ("storage_options: {secret: hush, region: eu}", "hush"),
        ("client_kwargs.api_key=zzz", "zzz"),
        ("token: 0123456789abcdefghij", "0123456789abcdefghij"),
        ("clone https://user:pa55@host/repo", "user:pa55"),
        ("s3://KEY:SECRET@bucket/path", "SECRET"),
        ("using hf_AbCdEfGhIjKlMnOpQr now", "hf_AbCdEfGhIjKlMnOpQr"),
        ("id AKIAIOSFODNN7EXAMPLE.", "AKIAIOSFODNN7EXAMPLE"),
        ("ghp_0123456789abcdefABCDEF", "ghp_0123456789abcdefABCDEF"),
        ("Authorization: Bearer abc.def-0123", "abc.def-0123"),
        ("authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("https://b.s3/x?X-Amz-Signature=deadbeef&y=1", "deadbeef"),
        ("https://a.blob/x?sv=1&sig=abc%2Fdef", "abc%2Fdef"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
    ],
)
def test_no_secret_survives(text: str, secret: str) -> None:
    masked = mask_secrets(text)
    assert secret not in masked
    assert MASK in masked
    assert mask_secrets(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "special_tokens:\n  pad_token: <|endoftext|>\n  eos_token: '</s>'",
        "max_new_tokens: 128\nnum_tokens=920000",
        "hub_token: null",
        "use_auth_token: true",
        "unknown token: <|im_end|>",
        "base_model: HuggingFaceTB/SmolLM2-135M\nlearning_rate: 2e-4",
        "s3://bucket/path/to/shard-00000.arrow",
        "mail me@example.org about basic arithmetic and bearer certificates",
        "key: 0b67cc79\nstage.key=4f",
        "datasets:\n  - path: data.jsonl\n    field_messages: conversations",
    ],
)
def test_everyday_text_is_unchanged(text: str) -> None:
    assert mask_secrets(text) == text


def test_the_rest_of_the_line_stays() -> None:
    text = "https://me:pw@host:5000/a?b=c and hub_token: xyz, region: eu"
    assert mask_secrets(text) == "https://***@host:5000/a?b=c and hub_token: ***, region: eu"


def test_maps_and_lists_are_masked_and_keep_their_shape() -> None:
    given = {"a": ["http://me:pw@host", 7], "hub_token": "abc", "pad_token": "</s>", "b": None}
    assert mask_texts(given) == {
        "a": ["http://***@host", 7],
        "hub_token": MASK,
        "pad_token": "</s>",
        "b": None,
    }


def test_secrets_of_the_environment_are_masked_whatever_they_begin_with(monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/abcDEF0123456789")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/google.json")
    assert mask_secrets("signing with /abcDEF0123456789") == f"signing with {MASK}"
    assert mask_secrets("reading /home/me/google.json") == "reading /home/me/google.json"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://AKIA:plan/ted+key@bucket/x", "s3://***@bucket/x"),
        ("cannot open s3://k:plan/ted@b: refused", "cannot open s3://***@b: refused"),
        ("http://host:80/path/me@x", "http://host:80/path/me@x"),
        ("see https://host/x and me@host", "see https://host/x and me@host"),
    ],
)
def test_a_password_with_a_slash_is_masked_and_a_port_is_not(text, masked):
    assert mask_secrets(text) == masked
