"""agent.toml: what is accepted, and how what isn't is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aios_edge.errors import SettingsError
from device_agent.settings import Settings, check_model_names, load_settings, parse_settings, read_secret

LEAST = '[device]\nid = "d"\nprofile = "rpi5"\n'
BASE = Path("/etc/aios")


def tenant(id: str = "x", key_sha256: str = "1" * 64, **more: Any) -> str:
    lines = [f"{name} = {value}" for name, value in more.items()]
    return "\n".join(["[[tenant]]", f'id = "{id}"', f'key_sha256 = "{key_sha256}"', *lines, ""])


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
        'tls_cert = "c.pem"\ntls_key = "k.pem"\n'
        '[mqtt]\nurl = "mqtts://b"\nusername = "u"\npassword_file = "pw"\nca = "ca.pem"\ncert = "c"\nkey = "k"\n'
        'protocol = "3.1.1"\nformat = "json"\ninterval_s = 2\n'
        '[[bundle]]\npath = "b1"\npinned = true\n[[bundle]]\npath = "/b2"\n'
        '[repository]\npath = "models"\n'
        "[policy]\nqueue_limit = 3\nhedge = true\ndefault_deadline_s = 0.5\nmax_temperature_c = 80\n"
        "avoid_when_throttled = true\n"
        'min_battery_percent = 15\nmax_memory_pressure_percent = 20\nmin_confidence = 0.7\ntrace = "t"\n'
        '[[cloud]]\nname = "c"\nurl = "https://x"\nmodel_map = {a = "b:2"}\nbearer_file = "t"\nca = "ca"\n'
        "timeout_s = 1\nweight = 0\nrequests_per_day = 9\nbytes_per_day = 99\n"
        'client_cert = "me.pem"\nclient_key = "me.key"\ncompression = "gzip"\n'
        "cost_per_request = 0.1\ncost_per_day = 5\n"
        f"{tenant(requests_per_s=0.5, burst=2, bytes_per_day=10, priority_ceiling=3, models=['a'], unix_uids=[0])}"
        "[emulate]\nslowdown = 8\n"
    )
    assert settings.device.profile == str(BASE / "my.toml") and str(settings.device.state_dir) == "/var/lib/aios"
    assert [entry.path for entry in settings.bundle] == [BASE / "b1", Path("/b2")]
    assert settings.repository and settings.repository.path == BASE / "models"
    assert settings.policy.trace == BASE / "t" and settings.policy.min_confidence == 0.7
    assert settings.http.unix_socket == BASE / "run/a.sock"
    assert settings.cloud[0].model_map == {"a": "b:2"} and settings.cloud[0].bearer_file == BASE / "t"
    assert settings.cloud[0].client_cert == BASE / "me.pem" and settings.cloud[0].client_key == BASE / "me.key"
    assert settings.http.tls_key == BASE / "k.pem" and settings.tenant[0].models == ("a",)
    assert settings.mqtt and settings.mqtt.password_file == BASE / "pw"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("[htttp]\n", "Did you mean 'http'?"),
        ('[http]\nbnid = "x"', "Did you mean 'bind'?"),
        ("[emulate]\nslowdwon = 2", "Did you mean 'slowdown'?"),
        ('[repository]\npth = "x"', "Did you mean 'path'?"),
        ("[repository]\n", "missing required field `path`"),
        ('[http]\ntls_cert = "x"', "a certificate needs its key"),
        ('[http]\ntls_key = "x"', "a certificate needs its key"),
        ('[http]\nbind = ""\nunix_socket = "s"\ntls_cert = "x"\ntls_key = "x"', "there is no TCP door for it"),
        ('[http]\nbind = "0.0.0.0:1"\ntls_cert = "x"\ntls_key = "x"', "there is no tenant with a key."),
        (f'[http]\nbind = "0.0.0.0:1"\n{tenant()}', "there is no TLS."),
        (
            '[http]\nbind = "0.0.0.0:1"\nunix_socket = "s"\n[[tenant]]\nid = "x"\nunix_uids = [0]',
            "no TLS and no tenant",
        ),
        ('[[tenant]]\nid = "x"', "tenant[0].key_sha256: nobody could ever be this tenant"),
        ('[[tenant]]\nid = "x"\nkey = "secret"', "unknown key 'key' in [tenant]"),
        (tenant("../x"), "tenant[0].id: '../x' can't name a file"),
        (tenant(".x"), "can't name a file"),
        (tenant() + tenant("X"), "tenant[1].id: 'X' appears twice"),
        (tenant() + tenant("y"), "tenant[1].key_sha256: is another tenant's key"),
        (tenant(key_sha256="A" * 64), "64 hex digits"),
        (tenant(unix_uids=[0]), "there is no Unix socket"),
        (f'[http]\nunix_socket = "s"\n{tenant(unix_uids=[0])}{tenant("y", "2" * 64, unix_uids=[0])}', "one tenant"),
        (f'[http]\nunix_socket = "s"\n{tenant(unix_uids=[-1])}', "is negative"),
        (tenant(requests_per_s=0), "tenant[0].requests_per_s: must be greater than 0"),
        (tenant(requests_per_s="nan"), "must be greater than 0"),
        (tenant(requests_per_s="inf"), "is not a finite number"),
        (tenant(burst=2), "there is no rate"),
        (tenant(bytes_per_day=-1), "tenant[0].bytes_per_day: must be greater than 0"),
        (tenant(priority_ceiling=-1), "is no priority"),
        (tenant(admin="true", models=[]), "an admin sees every model"),
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
        ('[http]\ngrpc_bind = "0.0.0.0:8081"', "http.grpc_bind: 0.0.0.0 is not loopback, and there is no TLS"),
        ('[http]\ngrpc_bind = "[::]:8081"', "http.grpc_bind: :: is not loopback"),
        (f'[http]\ngrpc_bind = "0.0.0.0:8081"\n{tenant()}', "there is no TLS"),
        ('[http]\ngrpc_bind = "0.0.0.0:8081"\ntls_cert = "c"\ntls_key = "k"', "there is no tenant with a key"),
        ('[http]\ngrpc_bind = "8081"', "http.grpc_bind: '8081' is not host:port"),
        ('[http]\ngrpc_bind = "127.0.0.1:8080"', "http.grpc_bind: 127.0.0.1:8080 is the HTTP door's address"),
        ('[http]\nbind = ""\ngrpc_bind = "127.0.0.1:8081"', "neither bind nor unix_socket"),
        ('[http]\nmax_body_bytes = "big"', "http.max_body_bytes"),
        ("[policy]\nqueue_limit = 0", "greater than 0"),
        ("[policy]\nmin_confidence = 60", "more than 1"),
        ("[policy]\nmin_battery_percent = 120", "more than 100 percent"),
        ("[policy]\nmax_memory_pressure_percent = 0", "greater than 0"),
        ("[policy]\nmax_temperature_c = nan", "policy.max_temperature_c: nan is not a finite number"),
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


def test_beyond_loopback_with_tls_and_a_key() -> None:
    text = f'[http]\nbind = "0.0.0.0:80"\ntls_cert = "c.pem"\ntls_key = "k.pem"\n{tenant()}'
    assert parse(LEAST + text).http.tls_cert == BASE / "c.pem"
    text = f'[http]\ngrpc_bind = "0.0.0.0:81"\ntls_cert = "c.pem"\ntls_key = "k.pem"\n{tenant()}'
    assert parse(LEAST + text).http.grpc_bind == "0.0.0.0:81"
    assert parse(LEAST + '[http]\ngrpc_bind = "0.0.0.0:81"\nallow_insecure = true').http.grpc_bind == "0.0.0.0:81"
    assert parse(LEAST + '[http]\nbind = "127.0.0.1:0"\ngrpc_bind = "127.0.0.1:0"').http.grpc_bind == "127.0.0.1:0"


def test_what_stands_where_a_hash_should_is_not_repeated() -> None:
    assert "aios_secret" not in refusal(LEAST + tenant(key_sha256="aios_secret"))
    assert "aios_secret" not in refusal(LEAST + '[[tenant]]\nid = "x"\nkey = "aios_secret"')


def test_models_of_a_tenant_are_models_of_this_device() -> None:
    settings = parse(LEAST + tenant(models=["tiny"]) + '[[bundle]]\npath = "b"\n')
    entry = settings.bundle[0]
    check_model_names(settings, {"tiny": entry, "other": entry})
    with pytest.raises(SettingsError, match=r"tenant.x.models: no model here is named 'tiny'. Did you mean 'tinny'"):
        check_model_names(settings, {"tinny": entry})


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
