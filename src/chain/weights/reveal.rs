//! Computes when committed weights are revealed: the subnet's epochs to come, and the drand round
//! that a commit is encrypted to. It also writes the bytes that are encrypted.

use super::Vector;
use crate::chain::keys::Hotkey;
use crate::chain::timelock::Drand;
use subxt::ext::codec::Encode;

/// Blocks without a step after which the chain runs an epoch in any case: `MAX_TEMPO`.
const STEP_MAX: u64 = 50_400;
/// Epochs that a commit may wait for; the chain allows 100.
const PERIOD_MAX: u64 = 1000;
/// Blocks after the revealing epoch's first one at which the round is: the chain tries again in
/// each block of the epoch.
const AFTER: u64 = 3;
/// Blocks before it, for runtimes that try only once: about what the SDK of their time chose.
const BEFORE: u64 = 6;

/// How a runtime counts epochs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RevealEpochs {
    /// By a counter, since May 2026.
    Counted {
        /// Block of the last epoch.
        last: u64,
        /// Block at which the owner wants one; 0 for none.
        pending: u64,
        /// The number of the epoch.
        index: u64,
        /// Blocks since the last step.
        since_step: u64,
    },
    /// By the block's number.
    Modular,
}

/// A subnet's epochs, as known at one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// The number of the subnet.
    pub netuid: u16,
    /// The block at which the schedule was read.
    pub block: u64,
    /// Its time, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Milliseconds between two blocks.
    pub block_ms: u64,
    /// Blocks of an epoch.
    pub tempo: u16,
    /// Epochs between a commit and its revelation.
    pub period: u64,
    /// How they are counted.
    pub epochs: RevealEpochs,
}

/// When a commit in the next block is revealed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reveal {
    /// The epoch that the commit belongs to.
    pub epoch: u64,
    /// The first block of the epoch that reveals it.
    pub block: u64,
    /// The drand round to encrypt to.
    pub round: u64,
}

/// Whether a runtime reveals in each block of an epoch, or only in the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retries {
    /// In each, since July 2025.
    EachBlock,
    /// In the first.
    Once,
}

/// Why no commit can be made now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The subnet, whose tempo is 0.
    #[error("subnet {0} has no epochs: its tempo is 0")]
    NoEpochs(u16),
    /// More epochs than any subnet has commits wait for.
    #[error("commits wait for {0} epochs: at most {PERIOD_MAX}")]
    Period(u64),
    /// The time of a block is beyond all rounds.
    #[error("block {block} has no time of a drand round")]
    NoRound {
        /// Number of the block.
        block: u64,
    },
    /// An epoch is beyond all blocks.
    #[error("epoch {epoch} has no first block")]
    NoBlock {
        /// Number of the epoch, as the chain counts them.
        epoch: u64,
    },
}

impl Schedule {
    /// When a commit in the next block is revealed.
    ///
    /// # Errors
    /// When the subnet has no epochs, or the numbers are beyond all bounds.
    pub fn reveal(&self, drand: &Drand, retries: Retries) -> Result<Reveal, ScheduleError> {
        if self.tempo == 0 {
            return Err(ScheduleError::NoEpochs(self.netuid));
        }
        if self.period > PERIOD_MAX {
            return Err(ScheduleError::Period(self.period));
        }
        let (epoch, block) = match self.epochs {
            RevealEpochs::Modular => self.modular()?,
            RevealEpochs::Counted { .. } => self.counted(),
        };
        let target = match retries {
            Retries::EachBlock => block.saturating_add(AFTER),
            Retries::Once => block.saturating_sub(BEFORE).max(self.block),
        };
        let wait = target.saturating_sub(self.block).checked_mul(self.block_ms);
        let at = wait.and_then(|wait| wait.checked_add(self.unix_ms));
        let round = at.and_then(|at| drand.round_at(at));
        let round = round.ok_or(ScheduleError::NoRound { block: target })?;
        Ok(Reveal { epoch, block, round })
    }

    /// Epoch e begins at block e * (tempo + 1) - (netuid + 1).
    fn modular(&self) -> Result<(u64, u64), ScheduleError> {
        let (length, shift) = (u64::from(self.tempo) + 1, u64::from(self.netuid) + 1);
        let epoch = self.block.saturating_add(shift + 1) / length;
        let first = (epoch + self.period).checked_mul(length).and_then(|b| b.checked_sub(shift));
        Ok((epoch, first.ok_or(ScheduleError::NoBlock { epoch })?))
    }

    /// The chain's own counter, run on from the next block.
    fn counted(&self) -> (u64, u64) {
        let RevealEpochs::Counted { mut last, mut pending, mut index, mut since_step } =
            self.epochs
        else {
            return (0, self.block);
        };
        let tempo = u64::from(self.tempo);
        let mut block = self.block.saturating_add(1);
        let mut epoch = None;
        loop {
            let by_step = block.saturating_add((STEP_MAX + 1).saturating_sub(since_step));
            let by_tempo = last.saturating_add(tempo).min(by_step);
            let due = if pending > 0 { by_tempo.min(pending) } else { by_tempo };
            let fires = due.max(block);
            // A commit in a block that begins an epoch belongs to it.
            let next = index.saturating_add(1);
            let own = *epoch.get_or_insert(if fires == block { next } else { index });
            index = next;
            if index >= own.saturating_add(self.period) {
                return (own, fires);
            }
            (last, pending, since_step, block) = (fires, 0, 0, fires.saturating_add(1));
        }
    }
}

/// What a commit hides: since August 2025 with the hotkey that commits, so that nobody else can
/// send the same bytes.
pub fn payload(hotkey: Option<&Hotkey>, vector: &Vector, version_key: u64) -> Vec<u8> {
    let weights = (vector.uids(), vector.weights(), version_key);
    match hotkey {
        Some(hotkey) => (hotkey.0.to_vec(), weights).encode(),
        None => weights.encode(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::timelock::QUICKNET;

    fn schedule(tempo: u16, period: u64, block: u64, epochs: RevealEpochs) -> Schedule {
        let unix_ms = 1_795_000_000_000;
        Schedule { netuid: 4, block, unix_ms, block_ms: 12_000, tempo, period, epochs }
    }

    /// What the official library (bittensor_core 0.1.5, `get_encrypted_commit_v2`) chose for the
    /// same states: tempo, period, block, last, pending, index, since the last step; the block.
    const OFFICIAL: [[u64; 8]; 20] = [
        [361, 1, 4286656, 4286294, 4286681, 3815, 50401, 4287018],
        [10, 1, 870953, 870952, 0, 3120, 50399, 870956],
        [361, 1, 1711846, 1711485, 0, 3344, 50401, 1712208],
        [99, 1, 3055722, 3055624, 3055735, 3645, 98, 3055822],
        [10, 1, 2219633, 2219633, 0, 1364, 0, 2219643],
        [50400, 3, 3304082, 3253683, 0, 1360, 50399, 3455283],
        [10, 1, 4427029, 4427029, 0, 4883, 50400, 4427031],
        [10, 2, 8074504, 8074495, 0, 188, 9, 8074525],
        [50400, 2, 6001271, 5950872, 6001272, 3084, 50399, 6102072],
        [361, 1, 153310, 152950, 153312, 976, 360, 153672],
        [1, 1, 6163224, 6163224, 6163224, 2792, 0, 6163226],
        [50400, 1, 5316021, 5290821, 5316035, 2534, 25200, 5316035],
        [10, 1, 5769558, 5769553, 5769560, 457, 50399, 5769560],
        [10, 1, 6943788, 6943788, 6943788, 482, 0, 6943799],
        [360, 3, 4947140, 4947139, 4947141, 3999, 1, 4948221],
        [1, 2, 6326022, 6326021, 6326024, 1476, 50399, 6326025],
        [99, 3, 8007740, 8007691, 0, 1408, 50401, 8008038],
        [10, 3, 3991400, 3991389, 0, 2282, 11, 3991431],
        [99, 1, 8601801, 8601752, 0, 3434, 49, 8601851],
        [360, 1, 3342306, 3342305, 0, 3129, 1, 3342665],
    ];

    #[test]
    fn counted_epochs_are_those_of_the_official_library() {
        for [tempo, period, block, last, pending, index, since_step, want] in OFFICIAL {
            let epochs = RevealEpochs::Counted { last, pending, index, since_step };
            let schedule = schedule(tempo as u16, period, block, epochs);
            let reveal = schedule.reveal(&QUICKNET, Retries::EachBlock).unwrap();
            assert_eq!(reveal.block, want, "{schedule:?}");
            assert!(reveal.epoch == index || reveal.epoch == index + 1);
            let seconds = 1_795_000_000 + (want + 3 - block) * 12;
            assert_eq!(reveal.round, (seconds - QUICKNET.genesis) / 3);
        }
    }

    #[test]
    fn modular_epochs_begin_where_the_chain_says() {
        // Epoch 1000 of tempo 360 on subnet 4 begins at 1000 * 361 - 5.
        for (block, period, epoch, first) in [
            (360_990, 1, 999, 360_995),
            (360_993, 1, 999, 360_995),
            // The next block is the first one of epoch 1000.
            (360_994, 1, 1000, 361_356),
            (360_994, 2, 1000, 361_717),
        ] {
            let schedule = schedule(360, period, block, RevealEpochs::Modular);
            let reveal = schedule.reveal(&QUICKNET, Retries::EachBlock).unwrap();
            assert_eq!((reveal.epoch, reveal.block), (epoch, first));
            let once = schedule.reveal(&QUICKNET, Retries::Once).unwrap();
            assert!(once.round < reveal.round && (once.epoch, once.block) == (epoch, first));
        }
    }

    #[test]
    fn a_schedule_without_epochs_or_bounds_is_refused() {
        let none = schedule(0, 1, 7, RevealEpochs::Modular).reveal(&QUICKNET, Retries::EachBlock);
        assert!(none.unwrap_err().to_string().contains("tempo is 0"));
        let long =
            schedule(9, 1 << 40, 7, RevealEpochs::Modular).reveal(&QUICKNET, Retries::EachBlock);
        assert!(long.unwrap_err().to_string().contains("at most 1000"));
        let early = Schedule { unix_ms: 5, ..schedule(9, 1, 7, RevealEpochs::Modular) };
        assert!(early.reveal(&QUICKNET, Retries::EachBlock).is_err());
        let (last, index) = (u64::MAX - 1, 1);
        let epochs = RevealEpochs::Counted { last, pending: 0, index, since_step: 0 };
        let far = schedule(9, 1, 7, epochs).reveal(&QUICKNET, Retries::EachBlock);
        assert_eq!(far.map(|reveal| reveal.block), Ok(50_409));
    }

    #[test]
    fn payloads_are_those_of_the_vectors() {
        let vectors = crate::chain::tests::vectors("tlock_vectors.json");
        let alice = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY".parse().unwrap();
        // The vectors' values are 40000 and 65535 for uids 1 and 2.
        let vector = Vector::new(vec![(1, 40_000), (2, 65_535)]).unwrap();
        for (name, hotkey) in [("crv4_payload", Some(&alice)), ("legacy_payload_spec293", None)] {
            assert_eq!(vectors[name]["plaintext_hex"], hex::encode(payload(hotkey, &vector, 0)));
        }
    }
}
