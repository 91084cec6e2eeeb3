//! Stores which hotkey holds which uid. A new hotkey at a uid gets none of the samples of the one
//! before.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::rows::{get, get_number, number, placeholders};
use super::session::{Bound, Session};
use std::collections::BTreeMap;

/// Rows of one statement.
const ROWS_MAX: usize = 512;

/// The newest row of each uid.
const HELD: &str = "SELECT h.uid, h.hotkey, h.since_block FROM hotkeys h
    WHERE h.netuid = $1 AND h.since_block = (SELECT MAX(l.since_block) FROM hotkeys l
        WHERE l.netuid = h.netuid AND l.uid = h.uid)
    ORDER BY h.uid";

impl Store {
    /// Remembers who holds which uid at a block. Rounds say so of those that they asked; this says
    /// it of everyone, as soon as the metagraph shows it.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub async fn save_hotkeys(
        &self,
        netuid: u16,
        block: u64,
        hotkeys: &BTreeMap<u16, String>,
    ) -> Result<(), StoreError> {
        let operation = format!("save the hotkeys of netuid {netuid}");
        let mut session = self.write(&operation).await?;
        let held = hotkeys.iter().map(|(uid, hotkey)| (*uid, hotkey.as_str()));
        note(&mut session, netuid, block, &held.collect()).await?;
        session.commit().await
    }

    /// Who holds which uid, as far as it is known.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn hotkeys(&self, netuid: u16) -> Result<BTreeMap<u16, String>, StoreError> {
        let mut session = self.read(&format!("read the hotkeys of netuid {netuid}")).await?;
        let held = held(&mut session, netuid).await?;
        session.commit().await?;
        Ok(held.into_iter().map(|(uid, (hotkey, _))| (uid, hotkey)).collect())
    }
}

/// Hotkey and first block of each uid.
async fn held(
    session: &mut Session,
    netuid: u16,
) -> Result<BTreeMap<u16, (String, i64)>, StoreError> {
    let rows = session.rows(HELD, vec![netuid.into()]).await?;
    let read = |row| -> Result<_, Cause> {
        Ok((get_number(row, "uid")?, (get(row, "hotkey")?, get(row, "since_block")?)))
    };
    rows.iter().map(read).collect::<Result<_, _>>().map_err(|cause| session.error(cause))
}

/// Adds a row for each uid that another hotkey holds since the newest row. What is older than that
/// row says nothing of today.
pub(super) async fn note(
    session: &mut Session,
    netuid: u16,
    block: u64,
    hotkeys: &BTreeMap<u16, &str>,
) -> Result<(), StoreError> {
    let block = number("block", block).map_err(|cause| session.error(cause))?;
    let held = held(session, netuid).await?;
    let mut changed: Vec<(u16, i64, &str)> = Vec::new();
    for (uid, hotkey) in hotkeys {
        match held.get(uid) {
            None => changed.push((*uid, 0, hotkey)),
            Some((known, since)) if known != hotkey && block >= *since => {
                changed.push((*uid, block, hotkey));
            }
            Some(_) => {}
        }
    }
    for some in changed.chunks(ROWS_MAX) {
        let sql = format!(
            "INSERT INTO hotkeys (netuid, uid, since_block, hotkey) VALUES {}
             ON CONFLICT (netuid, uid, since_block) DO UPDATE SET hotkey = excluded.hotkey",
            placeholders(some.len(), 4)
        );
        let mut values: Vec<Bound<'_>> = Vec::with_capacity(4 * some.len());
        for (uid, since, hotkey) in some {
            values.extend([netuid.into(), (*uid).into(), (*since).into(), (*hotkey).into()]);
        }
        session.execute(&sql, values).await?;
    }
    Ok(())
}
