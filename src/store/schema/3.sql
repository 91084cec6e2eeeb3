-- Version 3. The blocks that may contain the extrinsic with an epoch's weights: it is in none up to
-- the first, at which it was signed, and in none after the second. A commit has its `reveal_round`
-- from when it is sent on.

ALTER TABLE weights ADD COLUMN after_block BIGINT;
ALTER TABLE weights ADD COLUMN until_block BIGINT;
