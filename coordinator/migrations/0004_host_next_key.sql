-- A host that changes its WireGuard key has two for a while: the one it had, and the next one, from the given time and revision on.
ALTER TABLE host ADD COLUMN next_wg_key TEXT;
ALTER TABLE host ADD COLUMN next_wg_at BIGINT;
ALTER TABLE host ADD COLUMN next_wg_revision BIGINT;
