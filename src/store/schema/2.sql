-- Version 2. What a verification measured of an answer, where it did: how many rows it computed
-- logits for and the mean margin of their tokens, the trimmed mean of all rows' energies and the
-- twin's number with their limits, and the likeliest known cheat with its beta.

ALTER TABLE responses ADD COLUMN rows_scored BIGINT;
ALTER TABLE responses ADD COLUMN margin DOUBLE PRECISION;
ALTER TABLE responses ADD COLUMN trimmed DOUBLE PRECISION;
ALTER TABLE responses ADD COLUMN trimmed_limit DOUBLE PRECISION;
ALTER TABLE responses ADD COLUMN twin DOUBLE PRECISION;
ALTER TABLE responses ADD COLUMN twin_limit DOUBLE PRECISION;
ALTER TABLE responses ADD COLUMN likeliest TEXT;
ALTER TABLE responses ADD COLUMN beta DOUBLE PRECISION;
