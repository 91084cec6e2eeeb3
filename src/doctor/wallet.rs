//! Examines key files: whether they are there, whose they are, and who may read them.

use super::{Finding, Level};
use crate::chain::keyfile;
use crate::chain::keys::Hotkey;
use crate::chain::wallet::Wallet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const TOPIC: &str = "wallet";

/// Looks at a wallet's files; gives the hotkey's public part where it is known. No secret is
/// decrypted.
pub fn examine(wallet: &Wallet) -> (Option<Hotkey>, Vec<Finding>) {
    let mut findings = Vec::new();
    let hotkey = match wallet.hotkey() {
        Ok(hotkey) => {
            findings.push(Finding::new(TOPIC, Level::Ok, format!("hotkey {hotkey}")));
            Some(hotkey)
        }
        Err(e) => {
            let hint = e.hint.clone().unwrap_or_else(|| {
                "name it by --wallet.name and --wallet.hotkey, or make one: targon-engine wallet \
                 new-hotkey"
                    .into()
            });
            findings.push(Finding::new(TOPIC, Level::Fault, e.to_string()).hint(hint));
            None
        }
    };
    findings.extend(secret(&wallet.hotkey_file()));
    findings.push(coldkey(wallet));
    findings.extend(coldkey_secret(&wallet.coldkey_file().with_file_name("coldkey")));
    (hotkey, findings)
}

/// The file with the hotkey's secrets: its mode, and whether a password is at hand.
fn secret(path: &Path) -> Vec<Finding> {
    let place = path.display();
    let mode = match std::fs::metadata(path) {
        Ok(meta) => meta.permissions().mode() & 0o777,
        // A missing file was named already, unless only the public part is here.
        Err(e) => {
            let fact = format!("{place} cannot be read, so nothing can be signed: {e}");
            let hint = "only `serve` and `validate` sign; they need the hotkey's own file here";
            return vec![Finding::new(TOPIC, Level::Fault, fact).hint(hint)];
        }
    };
    let mut findings = Vec::new();
    if mode & 0o077 != 0 {
        let fact = format!("{place} has mode {mode:o}: others may read the key");
        let hint = format!("chmod 600 {place}");
        findings.push(Finding::new(TOPIC, Level::Fault, fact).hint(hint));
    }
    let Ok(bytes) = std::fs::read(path) else { return findings };
    match keyfile::is_encrypted(&bytes) {
        Err(what) => {
            let hint = "restore it from a backup, or from its phrase: targon-engine wallet";
            findings.push(Finding::new(TOPIC, Level::Fault, format!("{place} {what}")).hint(hint));
        }
        Ok(true) => {
            let variable = keyfile::password_variable(path);
            let finding = match std::env::var_os(&variable) {
                Some(_) => {
                    let fact = format!("the key file is encrypted, its password in {variable}");
                    Finding::new(TOPIC, Level::Ok, fact)
                }
                None => {
                    let fact = "the key file is encrypted: a password is asked for at every start";
                    Finding::new(TOPIC, Level::Note, fact)
                        .hint(format!("a service without a terminal needs {variable}"))
                }
            };
            findings.push(finding);
        }
        Ok(false) => {}
    }
    findings
}

fn coldkey(wallet: &Wallet) -> Finding {
    match wallet.coldkey() {
        Ok(key) => Finding::new(TOPIC, Level::Ok, format!("coldkey {key}, public part only")),
        Err(e) => Finding::new(TOPIC, Level::Note, format!("no public coldkey here: {e}")),
    }
}

/// The coldkey's secret must not be on a machine that serves the public.
fn coldkey_secret(path: &Path) -> Option<Finding> {
    path.exists().then(|| {
        let fact = format!("{} holds the coldkey's secret", path.display());
        Finding::new(TOPIC, Level::Warning, fact)
            .hint("keep it on a machine that serves nobody: mining and validating never need it")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(wallet: &Wallet) -> Vec<(Level, String)> {
        examine(wallet).1.into_iter().map(|f| (f.level, f.fact)).collect()
    }

    #[test]
    fn files_are_found_and_modes_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(dir.path(), "w", "h").unwrap();
        let missing = examine(&wallet);
        assert!(missing.0.is_none());
        assert!(missing.1.iter().any(|f| f.level == Level::Fault && f.hint.is_some()));

        let key = wallet.create_hotkey().unwrap().hotkey();
        let (found, made) = examine(&wallet);
        assert_eq!(found, Some(key));
        assert!(made.iter().all(|f| f.level < Level::Warning), "{made:?}");

        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(wallet.hotkey_file(), open).unwrap();
        let is_named =
            |(level, fact): &(Level, String)| *level == Level::Fault && fact.contains("mode 644");
        assert!(findings(&wallet).iter().any(is_named));

        std::fs::write(dir.path().join("w/coldkey"), "secret").unwrap();
        let is_told = |(level, fact): &(Level, String)| {
            *level == Level::Warning
                && fact.contains("coldkey's secret")
                && !fact.contains("phrase")
        };
        assert!(findings(&wallet).iter().any(is_told));
    }
}
