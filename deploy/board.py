#!/usr/bin/env python3
"""What scripts/lint-deploy asks about the Grafana board and the alerts.

board.py rules BOARD                       every expression as a recording rule, for promtool
board.py names BOARD ALERTS METRICS [open] names that the text of /metrics lacks (open: a plain
                                           server's, so what only a miner has may be missing)
board.py query BOARD URL                   evaluates every expression in a running Prometheus
"""

import json
import re
import sys
import urllib.parse
import urllib.request

# What only a miner has.
MINER = re.compile(r"targon_(signed|validator_requests|auth|chain|uid|stake|incentive)")
# Prometheus' own.
OWN = {"up", "ALERTS"}
WORDS = {"and", "or", "unless", "by", "on", "ignoring", "without", "bool", "offset"}
SUFFIXES = {
    "counter": ["_total"],
    "histogram": ["_bucket", "_sum", "_count"],
    "gauge": [""],
}


def fail(text):
    sys.exit(f"error: {text}")


def expressions(board):
    """(title, expression) of each target, and of the annotations."""
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in board["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"]


def filled(expression):
    """With values in the place of Grafana's variables."""
    text = expression.replace("$__rate_interval", "1m")
    return re.sub(r"\$(instance|model)\b", ".*", text)


def check_shape(board):
    """What an import needs, and what would make a panel look at the wrong place."""
    ids = [p["id"] for p in board["panels"]]
    if len(ids) != len(set(ids)):
        fail("two panels have the same id")
    if board["schemaVersion"] < 42:
        fail("schemaVersion is old")
    cells = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        new = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        if cells & new or at["x"] + at["w"] > 24:
            fail(f"the panel {panel['title']} lies over another, or beyond the edge")
        cells |= new
        for part in [panel, *panel.get("targets", [])]:
            if panel["type"] != "row" and part["datasource"]["uid"] != "${datasource}":
                fail(f"the panel {panel['title']} has a data source of its own")
    for _, expression in expressions(board):
        left = re.findall(r"\$\w+", filled(expression))
        if left:
            fail(f"no such variable: {left[0]} in {expression}")


def names(expression):
    """Metric names of a PromQL expression."""
    if match := re.match(r"label_values\((.*),\s*\w+\)$", expression):
        expression = match[1]
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    text = re.sub(r"\b(by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", " ", text)
    found = re.findall(r"[A-Za-z_:][\w:]*(?![\w:]*\s*\()", re.sub(r"\b[\d.]+\w*", " ", text))
    return set(found) - WORDS - OWN


def alert_expressions(text):
    """`expr:` of each alert: one line, or an indented block."""
    for match in re.finditer(r"^( *)expr: (?:\|\n((?:\1 +.*\n)+)|(.*)\n)", text, re.M):
        yield match[2] or match[3]


def known(metrics):
    """Names of samples, from the TYPE lines of an OpenMetrics text."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", metrics, re.M):
        found |= {name + suffix for suffix in SUFFIXES.get(kind, [""])}
    return found


def command_rules(board):
    print("groups:\n  - name: board\n    rules:")
    for number, (_, expression) in enumerate(expressions(board)):
        print(f"      - record: board:{number}\n        expr: {json.dumps(filled(expression))}")


def command_names(board, alerts_path, metrics_path, mode=""):
    with open(alerts_path) as file:
        wanted = set().union(*map(names, alert_expressions(file.read())))
    for _, expression in expressions(board):
        wanted |= names(expression)
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            wanted |= names(variable["query"]["query"])
    with open(metrics_path) as file:
        missing = wanted - known(file.read())
    excused = {n for n in missing if MINER.match(n)} if mode == "open" else set()
    if missing - excused:
        fail("/metrics lacks: " + ", ".join(sorted(missing - excused)))
    print(f"{len(wanted) - len(missing)} of {len(wanted)} names are in /metrics", end="")
    print(f"; only a miner has {', '.join(sorted(excused))}" if excused else "")


def command_query(board, url):
    total = with_data = 0
    for title, expression in expressions(board):
        query = urllib.parse.urlencode({"query": filled(expression)})
        try:
            with urllib.request.urlopen(f"{url}/api/v1/query?{query}") as answer:
                result = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            fail(f"{title}: {error.read().decode()}")
        total += 1
        with_data += bool(result)
    print(f"{total} expressions evaluate, {with_data} have data")


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        BOARD = json.load(file)
    check_shape(BOARD)
    globals()["command_" + sys.argv[1]](BOARD, *sys.argv[3:])
