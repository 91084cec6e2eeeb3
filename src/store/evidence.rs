//! Stores what is known of a miner over many answers, for each model: the state of the sequential
//! tests, as JSON that only `verify` reads.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::rows::{get_json, json};
use serde_json::Value;
use std::fmt;

/// Makes the row where there is none and locks it, so that others who change it wait.
const TAKE: &str = "INSERT INTO evidence (hotkey, model, state) VALUES ($1, $2, 'null')
    ON CONFLICT (hotkey, model) DO UPDATE SET state = evidence.state";
const SAVE: &str = "UPDATE evidence SET state = $3 WHERE hotkey = $1 AND model = $2";
const LOAD: &str = "SELECT state FROM evidence WHERE hotkey = $1 AND model = $2";

impl Store {
    /// What is known of a hotkey with a model, if anything.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn evidence(&self, hotkey: &str, model: &str) -> Result<Option<Value>, StoreError> {
        let session = self.read(&format!("read the evidence about {hotkey}")).await?;
        let values = vec![hotkey.into(), model.into()];
        let states = session.read(LOAD, values, |row| get_json(row, "state")).await?;
        Ok(states.into_iter().next())
    }

    /// Changes what is known of a hotkey with a model, and returns it as stored. `change` is given
    /// the newest state, or `None` where nothing is known; nobody else changes it meanwhile, so two
    /// changes at once both count.
    ///
    /// # Errors
    /// When it cannot be read or kept, or `change` refuses it; the caller must not act on it then.
    pub async fn change_evidence<E: fmt::Display>(
        &self,
        hotkey: &str,
        model: &str,
        change: impl FnOnce(Option<Value>) -> Result<Value, E> + Send,
    ) -> Result<Value, StoreError> {
        let mut session = self.write(&format!("change the evidence about {hotkey}")).await?;
        session.execute(TAKE, vec![hotkey.into(), model.into()]).await?;
        let rows = session.rows(LOAD, vec![hotkey.into(), model.into()]).await?;
        let known = match rows.first() {
            Some(row) => get_json::<Option<Value>>(row, "state"),
            None => Ok(None),
        };
        let changed = known.and_then(|known| {
            let state = change(known).map_err(|e| Cause::Record(format!("{e:#}")))?;
            Ok((json("state", &state)?, state))
        });
        let (text, state) = changed.map_err(|cause| session.error(cause))?;
        session.execute(SAVE, vec![hotkey.into(), model.into(), text.into()]).await?;
        session.commit().await?;
        Ok(state)
    }
}
