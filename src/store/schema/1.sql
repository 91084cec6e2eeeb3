-- Version 1. SQLite and PostgreSQL both run this text, so it keeps to what they share: BIGINT,
-- DOUBLE PRECISION and TEXT; JSON stands in TEXT, byte for byte as it was written. Times are
-- milliseconds since 1970 (UTC) where a name ends in `_ms`, else seconds.

CREATE TABLE rounds (
    id TEXT NOT NULL PRIMARY KEY,
    netuid BIGINT NOT NULL,
    block BIGINT NOT NULL,
    started_ms BIGINT NOT NULL,
    ended_ms BIGINT NOT NULL,
    model TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    profile TEXT NOT NULL,
    request TEXT NOT NULL
);
CREATE INDEX rounds_by_time ON rounds (started_ms, id);
CREATE INDEX rounds_by_block ON rounds (netuid, block);

-- One row for each miner of a round. `netuid` and `started_ms` are the round's.
CREATE TABLE responses (
    round TEXT NOT NULL REFERENCES rounds (id) ON DELETE CASCADE,
    netuid BIGINT NOT NULL,
    started_ms BIGINT NOT NULL,
    uid BIGINT NOT NULL,
    hotkey TEXT NOT NULL,
    coldkey TEXT NOT NULL,
    first_token DOUBLE PRECISION NOT NULL,
    all_tokens DOUBLE PRECISION NOT NULL,
    total DOUBLE PRECISION NOT NULL,
    tps DOUBLE PRECISION NOT NULL,
    tokens BIGINT NOT NULL,
    outcome TEXT NOT NULL,
    cause TEXT,
    error TEXT,
    sample TEXT NOT NULL,
    sample_tps DOUBLE PRECISION,
    report TEXT,
    capture TEXT,
    PRIMARY KEY (round, uid)
);
CREATE INDEX responses_by_uid ON responses (netuid, uid, started_ms, round);
CREATE INDEX responses_by_time ON responses (started_ms, round, uid);
CREATE INDEX responses_with_capture ON responses (started_ms) WHERE capture IS NOT NULL;
CREATE INDEX responses_with_report ON responses (started_ms) WHERE report IS NOT NULL;

-- What scores are made of. They outlive their rounds, so `round` refers to none. `at_ms` is the
-- round's end; a miss has no `tps`.
CREATE TABLE samples (
    round TEXT NOT NULL,
    netuid BIGINT NOT NULL,
    uid BIGINT NOT NULL,
    hotkey TEXT NOT NULL,
    model TEXT NOT NULL,
    block BIGINT NOT NULL,
    at_ms BIGINT NOT NULL,
    tps DOUBLE PRECISION,
    PRIMARY KEY (round, uid)
);
CREATE INDEX samples_by_miner ON samples (netuid, uid, hotkey, model, block, at_ms, round);
CREATE INDEX samples_by_time ON samples (at_ms, round, uid);

-- Who holds a uid from a block on, until the next row of that uid; the first row that was seen of a
-- uid counts from block 0.
CREATE TABLE hotkeys (
    netuid BIGINT NOT NULL,
    uid BIGINT NOT NULL,
    since_block BIGINT NOT NULL,
    hotkey TEXT NOT NULL,
    PRIMARY KEY (netuid, uid, since_block)
);

-- One row for each epoch. `progress` orders the states: 0 planned, 1 sent, 2 committed, 3 failed,
-- 4 confirmed; it only grows. `planner` is the run of the program that may send what is planned.
CREATE TABLE weights (
    netuid BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    block BIGINT NOT NULL,
    planned_ms BIGINT NOT NULL,
    progress BIGINT NOT NULL,
    state TEXT NOT NULL,
    extrinsic TEXT,
    reveal_round BIGINT,
    why TEXT,
    planner TEXT NOT NULL,
    weights TEXT NOT NULL,
    explanation TEXT NOT NULL,
    PRIMARY KEY (netuid, epoch)
);

-- What many answers of one miner with one model say together.
CREATE TABLE evidence (
    hotkey TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL,
    PRIMARY KEY (hotkey, model)
);
