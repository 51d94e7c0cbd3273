-- Whether, why and since when the mesh changes nothing, because agents may know better than this database: 'restored' or 'behind'.
ALTER TABLE mesh ADD COLUMN read_only TEXT;
ALTER TABLE mesh ADD COLUMN read_only_since BIGINT;

-- What hosts showed while it was so, for whoever decides how to go on. A host may be one that this database does not know.
CREATE TABLE sighting (
    host       TEXT   NOT NULL PRIMARY KEY,
    generation BIGINT,
    revision   BIGINT,
    source     TEXT   NOT NULL,
    seen_at    BIGINT NOT NULL
);
