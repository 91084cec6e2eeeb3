//! Stores what is known of a miner over many answers, for each model: the state of the sequential
//! tests, as JSON that only `verify` reads.

use super::database::Store;
use super::error::StoreError;
use super::rows::{get_json, json};
use serde_json::Value;

const SAVE: &str = "INSERT INTO evidence (hotkey, model, state) VALUES ($1, $2, $3)
    ON CONFLICT (hotkey, model) DO UPDATE SET state = excluded.state";
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

    /// Replaces what is known of a hotkey with a model.
    ///
    /// # Errors
    /// When it cannot be kept; the caller must not act on it then.
    pub async fn save_evidence(
        &self,
        hotkey: &str,
        model: &str,
        state: &Value,
    ) -> Result<(), StoreError> {
        let operation = format!("save the evidence about {hotkey}");
        let text = json("state", state).map_err(|cause| self.error(&operation, cause))?;
        let mut session = self.write(&operation).await?;
        session.execute(SAVE, vec![hotkey.into(), model.into(), text.into()]).await?;
        session.commit().await
    }
}
