-- What time the coordinator told last, in milliseconds since the Unix epoch, so that after a restart it tells none before: by the boot's
-- clock, when that was, and in which boot. At most `time_slack` milliseconds later was told without being noted.
ALTER TABLE mesh ADD COLUMN time_told BIGINT;
ALTER TABLE mesh ADD COLUMN time_slack BIGINT;
ALTER TABLE mesh ADD COLUMN time_boot TEXT;
ALTER TABLE mesh ADD COLUMN time_boot_at BIGINT;
