"""docs/webhooks.md: Alertmanager and Grafana send the documented body with the templates that the page shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import StartServer
from expected import parse
from processes import ROOT, Server, eventually, free_port

PAGE = (ROOT / "docs" / "webhooks.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
ALERTMANAGER, GRAFANA = map(yaml.safe_load, BLOCKS)
WEBHOOK = ALERTMANAGER["receivers"][0]["webhook_configs"][0]
SETTINGS = GRAFANA["contactPoints"][0]["receivers"][0]["settings"]
SUMMARY = '5: "quoted" größer\nline'

# The templates of the page, and the bodies that Alertmanager 0.35.0 and the webhook of grafana/alerting (August 2026)
# made of them. With another template, have them make another body.
RENDERED: dict[str, tuple[Any, Any, str]] = {
    "Alertmanager": (
        WEBHOOK["payload"],
        {
            "message": '{{ printf "[%s] %s: %.8000s" .Status .CommonLabels.alertname .CommonAnnotations.summary '
            "| toJson }}",
            "type": "alert",
            "topics": ["alerts"],
            "data": {
                "status": "{{ .Status | toJson }}",
                "labels": "{{ .CommonLabels | toJson }}",
                "url": "{{ .ExternalURL | toJson }}",
            },
        },
        r'{"data":{"labels":{"alertname":"DiskFull","instance":"db: 1"},"status":"firing","url":"http://alerts:9093"},'
        r'"message":"[firing] DiskFull: 5: \"quoted\" größer\nline","topics":["alerts"],"type":"alert"}'
        "\n",
    ),
    "Grafana": (
        SETTINGS["payload"]["template"],
        """\
{{ coll.Dict
  "message" (printf "[%s] %s: %.8000s" .Status .CommonLabels.alertname .CommonAnnotations.summary)
  "type" "alert"
  "topics" (coll.Slice "alerts")
  "data" (coll.Dict "status" .Status "labels" .CommonLabels "url" .ExternalURL)
| data.ToJSON }}
""",
        r'{"data":{"labels":{"alertname":"DiskFull","instance":"db: 1"},"status":"firing","url":"http://alerts:3000/"},'
        r'"message":"[firing] DiskFull: 5: \"quoted\" größer\nline","topics":["alerts"],"type":"alert"}'
        "\n\n",
    ),
}


@pytest.mark.parametrize("program", RENDERED)
def test_the_body_of_the_template_is_a_notification(server: Server, program: str) -> None:
    """The template of the page is the one that was rendered, and its subscribers get the alert."""
    shown, template, body = RENDERED[program]
    assert shown == template
    client = server.join(query="topics=alerts")
    headers = {"Content-Type": "application/json"}
    assert server.request("POST", "/notify", content=body.encode(), headers=headers).status_code == 200
    received = client.receive()
    data = parse(body.encode())["data"]
    assert (received["type"], received["topics"]) == ("alert", ["alerts"])
    assert received["data"] == {"message": f"[firing] DiskFull: {SUMMARY}", **data}
    assert data["labels"] == {"alertname": "DiskFull", "instance": "db: 1"}


def test_both_send_the_key_that_the_page_shows() -> None:
    """Both use the scheme of a bearer."""
    assert SETTINGS["authorization_scheme"] == "Bearer" and SETTINGS["url"] == WEBHOOK["url"]
    assert list(WEBHOOK["http_config"]["authorization"]) == ["credentials_file"]


@pytest.mark.skipif(shutil.which("alertmanager") is None, reason="needs Alertmanager 0.32; Debian's has no payload")
@pytest.mark.parametrize("key", ["a-long-random-secret", "ci:a-long-random-secret\n"])
def test_alertmanager_publishes_an_alert(start_server: StartServer, tmp_path: Path, key: str) -> None:
    """The configuration of the page, with another URL, another path of the key, and without the wait for a group."""
    server, secret, config = start_server("--api-key", "ci:a-long-random-secret"), tmp_path / "key", tmp_path / "yml"
    secret.write_text(key)
    text = BLOCKS[0].replace("http://localhost:8000", server.url).replace("route:\n", "route:\n  group_wait: 0s\n")
    config.write_text(text.replace(WEBHOOK["http_config"]["authorization"]["credentials_file"], str(secret)))
    address = f"127.0.0.1:{free_port()}"
    command = ["alertmanager", f"--config.file={config}", f"--storage.path={tmp_path}", "--cluster.listen-address="]
    process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL)
    alert = {"labels": {"alertname": "DiskFull", "instance": "db: 1"}, "annotations": {"summary": SUMMARY}}
    post = ["curl", "-sS", "--noproxy", "*", f"http://{address}/api/v2/alerts", "-d", json.dumps([alert])]
    post += ["-H", "Content-Type: application/json"]
    try:
        client = server.join(query="topics=alerts")
        eventually(lambda: subprocess.run(post, capture_output=True, check=False).returncode == 0)
        received = client.receive()
    finally:
        process.terminate()
        process.wait()
    assert received["type"] == "alert" and received["topics"] == ["alerts"]
    assert received["data"]["message"] == f"[firing] DiskFull: {SUMMARY}"
    assert received["data"]["labels"] == alert["labels"]
