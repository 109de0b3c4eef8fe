"""agent.toml: what is accepted, and how what isn't is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from aios_edge.errors import SettingsError
from device_agent.settings import Settings, load_settings, parse_settings, read_secret

LEAST = '[device]\nid = "d"\nprofile = "rpi5"\n'
BASE = Path("/etc/aios")


def parse(text: str) -> Settings:
    return parse_settings(text, where="agent.toml", base=BASE)


def refusal(text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(text)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_least_file_has_safe_defaults() -> None:
    settings = parse(LEAST)
    assert settings.http.bind == "127.0.0.1:8080" and settings.mqtt is None
    assert settings.device.state_dir == BASE / "state" and settings.emulate.slowdown == 1.0


def test_everything_there_is() -> None:
    settings = parse(
        '[device]\nid = "d"\ngroup = "g"\nprofile = "my.toml"\nstate_dir = "/var/lib/aios"\n'
        '[http]\nbind = "[::1]:0"\nunix_socket = "run/a.sock"\nmax_body_bytes = 1000\n'
        '[mqtt]\nurl = "mqtts://b"\nusername = "u"\npassword_file = "pw"\nca = "ca.pem"\ncert = "c"\nkey = "k"\n'
        'protocol = "3.1.1"\nformat = "json"\ninterval_s = 2\n'
        '[[bundle]]\npath = "b1"\npinned = true\n[[bundle]]\npath = "/b2"\n'
        "[policy]\nqueue_limit = 3\nhedge = true\ndefault_deadline_s = 0.5\n"
        '[[cloud]]\nname = "c"\nurl = "https://x"\nmodel_map = {a = "b:2"}\nbearer_file = "t"\nca = "ca"\n'
        "timeout_s = 1\nweight = 0\nrequests_per_day = 9\nbytes_per_day = 99\n"
        'client_cert = "me.pem"\nclient_key = "me.key"\ncompression = "gzip"\n'
        "cost_per_request = 0.1\ncost_per_day = 5\n"
        "[emulate]\nslowdown = 8\n"
    )
    assert settings.device.profile == str(BASE / "my.toml") and str(settings.device.state_dir) == "/var/lib/aios"
    assert [entry.path for entry in settings.bundle] == [BASE / "b1", Path("/b2")]
    assert settings.http.unix_socket == BASE / "run/a.sock"
    assert settings.cloud[0].model_map == {"a": "b:2"} and settings.cloud[0].bearer_file == BASE / "t"
    assert settings.cloud[0].client_cert == BASE / "me.pem" and settings.cloud[0].client_key == BASE / "me.key"
    assert settings.mqtt and settings.mqtt.password_file == BASE / "pw"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("[htttp]\n", "Did you mean 'http'?"),
        ('[http]\nbnid = "x"', "Did you mean 'bind'?"),
        ("[emulate]\nslowdwon = 2", "Did you mean 'slowdown'?"),
        ('[http]\ntls_cert = "x"', "http.tls_cert is not available in this version"),
        ('[[tenant]]\nid = "x"', "[tenant] is not available in this version"),
        ('[repository]\npath = "x"', "[repository] is not available in this version"),
        ('[mqtt]\nurl = "mqtt://x"\nformat = "sparkplug"', "is not available in this version"),
        ('[mqtt]\nurl = "mqtt://x"\nhome_assistant = true', "mqtt.home_assistant is not available"),
        (
            '[[cloud]]\nname = "c"\nurl = "http://x"\nrequests_per_day = 0',
            "cloud.c.requests_per_day: 0 must be greater",
        ),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\nclient_cert = "x"', "cloud.c.client_cert: http://x is no https"),
        ('[[cloud]]\nname = "c"\nurl = "https://x"\nclient_key = "x"', "cloud.c.client_key: a key needs a"),
        ('[[cloud]]\nname = "c"\nurl = "https://x"\ncompression = "br"', "cloud[0].compression"),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\nweight = -1', "cloud.c.weight: -1.0 is not a finite number"),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\nbytes_per_day = 1.5', "cloud[0].bytes_per_day"),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\ncost_per_request = -1', "cloud.c.cost_per_request: -1.0 is not"),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\ncost_per_day = 1', "cloud.c.cost_per_day: nothing costs anything"),
        ('[[cloud]]\nname = "c"\nurl = "ftp://x"', "not an http(s) URL"),
        ('[[cloud]]\nname = "c"\nurl = "http://"', "not an http(s) URL"),
        ('[[cloud]]\nname = "c"\nurl = "http://x:port"', "not an http(s) URL"),
        ('[[cloud]]\nname = "c"\nurl = "http://x:99999"', "not an http(s) URL"),
        ('[[cloud]]\nname = "c"\nurl = "http://[::1"', "not an http(s) URL"),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\n[[cloud]]\nname = "c"\nurl = "http://y"', "appears twice"),
        ('[http]\nbind = "0.0.0.0:8080"', "is not loopback"),
        ('[http]\nbind = ":8080"', "is not loopback"),
        ('[http]\nbind = "8080"', "is not host:port"),
        ('[http]\nbind = "127.0.0.1:99999"', "is not host:port"),
        ('[http]\nbind = ""', "neither bind nor unix_socket"),
        ('[http]\nmax_body_bytes = "big"', "http.max_body_bytes"),
        ("[policy]\nqueue_limit = 0", "greater than 0"),
        ("[emulate]\nslowdown = 0.5", "at least 1"),
        ("[emulate]\nslowdown = nan", "greater than 0"),
        ("[emulate]\nslowdown = inf", "emulate.slowdown: inf is not a finite number"),
        ("[policy]\ndrain_s = inf", "policy.drain_s: inf is not a finite number"),
        ("[policy]\nbreaker_backoff_s = nan", "policy.breaker_backoff_s: nan is not a finite number"),
        ('[mqtt]\nurl = "mqtt://x"\ninterval_s = inf', "mqtt.interval_s: inf is not a finite number"),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\ntimeout_s = inf', "cloud.c.timeout_s: inf is not a finite number"),
        ('[mqtt]\nurl = "mqtt://x"\npassword_file = "p"', "needs a username"),
        ("bundle = 5", "must be a table"),
        ("[[http]]\n", "must be a table"),
        ("x = [", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_remedy(more: str, says: str) -> None:
    top = f"{more}\n{LEAST}" if more.startswith(("bundle", "x =")) else f"{LEAST}{more}"
    text = refusal(top)
    assert says in text and "agent.toml" in text


def test_ids_are_levels_of_topics_and_the_profile_is_required() -> None:
    assert "MQTT topic" in refusal('[device]\nid = "a/b"\nprofile = "rpi5"')
    assert "profile" in refusal('[device]\nid = "a"')
    assert "device" in refusal("")


def test_insecure_is_possible_when_said_aloud() -> None:
    assert parse(LEAST + '[http]\nbind = "0.0.0.0:80"\nallow_insecure = true').http.allow_insecure


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--config"):
        load_settings(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        load_settings(tmp_path / "latin.toml")
    with pytest.raises(SettingsError, match="secret"):
        read_secret(tmp_path / "none")
    (tmp_path / "token").write_text("abc\n")
    assert read_secret(tmp_path / "token") == "abc"
