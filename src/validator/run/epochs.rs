//! Computes when epochs begin: as the chain counts them, or every so many blocks. It also records
//! which work of the current epoch is done.

use crate::chain::metagraph::Metagraph;

/// Most blocks between two looks whether an epoch has begun that is due.
const LOOK_BLOCKS_MAX: u64 = 32;

/// Where epochs begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EpochRule {
    /// Where the chain runs one for the subnet, as it says itself.
    Chain,
    /// At every block whose number is a multiple of this.
    Every(u64),
}

impl EpochRule {
    /// The first block of the newest epoch, as known from a reading.
    pub(super) fn began(self, metagraph: &Metagraph) -> u64 {
        match self {
            EpochRule::Chain => metagraph.last_step,
            EpochRule::Every(length) => metagraph.block - metagraph.block % length,
        }
    }

    /// Whether this reading tells of a later epoch than the one that began at `began`.
    pub(super) fn is_news(self, metagraph: &Metagraph, began: u64) -> bool {
        match self {
            EpochRule::Chain => metagraph.last_step > began,
            EpochRule::Every(_) => metagraph.block >= began,
        }
    }
}

/// Which epoch's work is done, and which is under way. An epoch is named by its first block.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Epoch {
    /// The first block of the newest epoch that has begun.
    pub(super) began: u64,
    pub(super) is_reading: bool,
    pub(super) is_read: bool,
    pub(super) is_settling: bool,
    pub(super) is_settled: bool,
    /// Whether old records were looked at, whatever came of it.
    pub(super) is_tidied: bool,
    /// Tried again from this block on.
    pub(super) again_at: u64,
    /// Where nobody serves anything, the subnet is read anew from this block on.
    pub(super) look_at: u64,
    /// The block at which the next one is due, where the chain counts.
    due: u64,
    /// Looks at the chain that found it not begun yet.
    looks: u32,
}

impl Epoch {
    /// The epoch of a reading, which is done.
    pub(super) fn of(epochs: EpochRule, metagraph: &Metagraph) -> Self {
        let began = epochs.began(metagraph);
        // The chain runs one `tempo` or `tempo` + 1 blocks after the last, by its version; one that
        // has none yet is looked at now and then.
        let tempo = u64::from(metagraph.hyperparameters.tempo).max(1);
        let due = began.saturating_add(tempo).max(metagraph.block + 1);
        Self { began, is_read: true, due, ..Self::default() }
    }

    /// A later one, with what is under way for the one before.
    pub(super) fn after(self, before: &Self) -> Self {
        Self { is_reading: before.is_reading, is_settling: before.is_settling, ..self }
    }

    /// Blocks from its first one to where the next epoch is due.
    pub(super) fn blocks(&self, epochs: EpochRule) -> u64 {
        match epochs {
            EpochRule::Chain => self.due.saturating_sub(self.began),
            EpochRule::Every(length) => length,
        }
    }

    /// A block has come: whether the subnet is to be read anew.
    pub(super) fn on_block(&mut self, epochs: EpochRule, block: u64) {
        match epochs {
            EpochRule::Chain => self.is_read &= block < self.due,
            EpochRule::Every(length) => {
                let began = block - block % length;
                if began > self.began {
                    *self = Self { began, ..Self::default() }.after(self);
                }
            }
        }
    }

    /// A reading of the epoch `found` was made where `head` was the newest block that was known.
    /// Returns whether it is the first one of a new epoch.
    pub(super) fn take(&mut self, epochs: EpochRule, found: Self, head: u64) -> bool {
        if found.began > self.began {
            *self = found.after(self);
            return true;
        }
        let was_read = self.is_read;
        if found.began < self.began || (!was_read && epochs == EpochRule::Chain) {
            self.not_yet(epochs, head);
            return false;
        }
        self.is_read = true;
        !was_read
    }

    /// The epoch that is due has not begun where the chain was read, when `block` was the newest
    /// block that was known.
    pub(super) fn not_yet(&mut self, epochs: EpochRule, block: u64) {
        if epochs != EpochRule::Chain {
            // The metagraph is read at a final block, which follows the newest one.
            self.again_at = block.saturating_add(1);
            return;
        }
        let wait = 1_u64.checked_shl(self.looks).unwrap_or(LOOK_BLOCKS_MAX).min(LOOK_BLOCKS_MAX);
        self.looks = self.looks.saturating_add(1);
        (self.is_read, self.due) = (true, block.saturating_add(wait));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::metagraph::Hyperparameters;

    fn metagraph(block: u64, last_step: u64, tempo: u16) -> Metagraph {
        let hyperparameters = Hyperparameters { tempo, ..Hyperparameters::default() };
        Metagraph::new(4, block, hyperparameters, Vec::new()).stepped_at(last_step)
    }

    #[test]
    fn the_chain_says_where_an_epoch_begins() {
        let chain = EpochRule::Chain;
        let mut epoch = Epoch::of(chain, &metagraph(1_100, 1_000, 360));
        assert_eq!((epoch.began, epoch.is_read), (1_000, true));
        assert_eq!(epoch.blocks(chain), 360);
        epoch.on_block(chain, 1_359);
        assert!(epoch.is_read);
        epoch.on_block(chain, 1_360);
        assert!(!epoch.is_read);
        // Not yet: looked at again after 1, 2, 4 ... 32 blocks.
        let mut block = 1_360;
        for wait in [1, 2, 4, 8, 16, 32, 32, 32] {
            assert!(!chain.is_news(&metagraph(block, 1_000, 360), epoch.began));
            epoch.not_yet(chain, block);
            epoch.on_block(chain, block + wait - 1);
            assert!(epoch.is_read, "{wait}");
            epoch.on_block(chain, block + wait);
            assert!(!epoch.is_read, "{wait}");
            block += wait;
        }
        assert!(chain.is_news(&metagraph(block, block - 3, 360), epoch.began));
        let next = Epoch::of(chain, &metagraph(block, block - 3, 360)).after(&epoch);
        assert_eq!((next.began, next.is_settled), (block - 3, false));
        // An owner's change of the tempo and a subnet that never had an epoch.
        assert_eq!(Epoch::of(chain, &metagraph(9, 0, 0)).due, 10);
        // An endpoint that is behind tells nothing new.
        assert!(!chain.is_news(&metagraph(900, 639, 360), 1_000));
    }

    #[test]
    fn multiples_of_a_length_are_epochs_too() {
        let every = EpochRule::Every(100);
        let mut epoch = Epoch::of(every, &metagraph(250, 33, 360));
        assert_eq!((epoch.began, epoch.blocks(every)), (200, 100));
        epoch.is_settling = true;
        epoch.on_block(every, 299);
        assert!((epoch.began, epoch.is_read) == (200, true));
        epoch.on_block(every, 305);
        assert!((epoch.began, epoch.is_read, epoch.is_settling) == (300, false, true));
        // The chain is read at a final block, some blocks behind.
        let behind = metagraph(299, 33, 360);
        assert!(!every.is_news(&behind, epoch.began));
        assert!(!epoch.take(every, Epoch::of(every, &behind), 305));
        assert_eq!((epoch.is_read, epoch.again_at), (false, 306));
        let there = metagraph(301, 33, 360);
        assert!(every.is_news(&there, epoch.began));
        assert!(epoch.take(every, Epoch::of(every, &there), 306));
        assert!(epoch.is_read && !epoch.take(every, Epoch::of(every, &there), 307));
    }

    #[test]
    fn a_subnet_that_is_read_between_two_epochs_begins_none() {
        let chain = EpochRule::Chain;
        let idle = metagraph(1_361, 1_000, 360);
        let mut epoch = Epoch::of(chain, &metagraph(1_100, 1_000, 360));
        assert!(!epoch.take(chain, Epoch::of(chain, &idle), 1_200) && epoch.is_read);
        epoch.on_block(chain, 1_361);
        assert!(!epoch.is_read && !epoch.take(chain, Epoch::of(chain, &idle), 1_361));
        assert!(epoch.is_read && epoch.due == 1_362, "looked at again, not at once");
        assert!(epoch.take(chain, Epoch::of(chain, &metagraph(1_370, 1_362, 360)), 1_370));
    }
}
