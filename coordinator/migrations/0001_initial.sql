-- The mesh's whole state. Times are Unix seconds, ids and keys their text forms, hashes 32 bytes. What is written here stays readable by
-- SQLite and Postgres alike, but for the type of byte strings.

-- One row: the mesh itself.
CREATE TABLE mesh (
    id               BIGINT NOT NULL PRIMARY KEY CHECK (id = 1),
    mesh             TEXT   NOT NULL,
    generation       BIGINT NOT NULL,
    revision         BIGINT NOT NULL,
    content_revision BIGINT NOT NULL,
    overlay_v4       TEXT   NOT NULL,
    overlay_v4_len   BIGINT NOT NULL,
    overlay_v6       TEXT   NOT NULL,
    lease_seconds    BIGINT NOT NULL,
    addresses        TEXT   NOT NULL,
    next_slot        BIGINT NOT NULL
);

-- Policy documents; the one with the highest version is in force.
CREATE TABLE policy (
    version    BIGINT NOT NULL PRIMARY KEY,
    text       TEXT   NOT NULL,
    placements TEXT   NOT NULL,
    applied_at BIGINT NOT NULL
);

-- Enrollment tokens: a hash of the secret, never the secret.
CREATE TABLE token (
    id          TEXT   NOT NULL PRIMARY KEY,
    secret_hash BLOB   NOT NULL,
    uses        BIGINT NOT NULL,
    uses_left   BIGINT NOT NULL CHECK (uses_left >= 0),
    expires     BIGINT NOT NULL,
    name_rule   TEXT   NOT NULL,
    labels      TEXT   NOT NULL,
    source      TEXT,
    created_at  BIGINT NOT NULL,
    revoked_at  BIGINT
);

-- Hosts, revoked ones included: a revoked row is a tombstone and never leaves.
CREATE TABLE host (
    id             TEXT   NOT NULL PRIMARY KEY,
    name           TEXT   NOT NULL,
    name_given     BIGINT NOT NULL CHECK (name_given IN (0, 1)),
    wg_key         TEXT   NOT NULL,
    identity       TEXT   NOT NULL,
    token          TEXT   NOT NULL REFERENCES token (id),
    enrolled_at    BIGINT NOT NULL,
    contested      BIGINT NOT NULL DEFAULT 0 CHECK (contested IN (0, 1)),
    revoked_at     BIGINT,
    last_seen      BIGINT,
    incarnation    BIGINT,
    view_revision  BIGINT,
    view_hash      BLOB,
    cert_serial    TEXT,
    cert_not_after BIGINT,
    next_serial    TEXT,
    next_not_after BIGINT
);
CREATE UNIQUE INDEX host_name ON host (name) WHERE revoked_at IS NULL;
CREATE INDEX host_token ON host (token);

-- Every key any host ever had: no key belongs to two hosts, in the whole history.
CREATE TABLE host_key (
    kind TEXT NOT NULL CHECK (kind IN ('wg', 'identity')),
    key  TEXT NOT NULL,
    host TEXT NOT NULL REFERENCES host (id),
    PRIMARY KEY (kind, key)
);

CREATE TABLE host_label (
    host  TEXT NOT NULL REFERENCES host (id),
    key   TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (host, key)
);

-- Which pair of addresses belongs to which instance: a slot is its number within the mesh's ranges.
CREATE TABLE instance (
    component TEXT   NOT NULL,
    host      TEXT   NOT NULL REFERENCES host (id),
    slot      BIGINT NOT NULL UNIQUE,
    given_at  BIGINT NOT NULL,
    gone_at   BIGINT,
    PRIMARY KEY (component, host)
);

-- API credentials: a hash of the secret, never the secret.
CREATE TABLE credential (
    id          TEXT   NOT NULL PRIMARY KEY,
    secret_hash BLOB   NOT NULL,
    name        TEXT   NOT NULL,
    scopes      TEXT   NOT NULL,
    created_at  BIGINT NOT NULL,
    expires     BIGINT NOT NULL,
    last_used   BIGINT,
    revoked_at  BIGINT
);

-- The audit: leaves as canonical bytes, each naming the hash of the one before.
CREATE TABLE audit (
    seq  BIGINT NOT NULL PRIMARY KEY,
    leaf BLOB   NOT NULL,
    hash BLOB   NOT NULL
);
