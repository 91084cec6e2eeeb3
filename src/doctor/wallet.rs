//! Examines key files: whether they are there, whose they are, and who may read them.

use super::{Finding, Level};
use crate::chain::keyfile;
use crate::chain::keys::Hotkey;
use crate::chain::wallet::{SeenHotkey, Wallet};
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
    // What both say of one file is said once.
    let said: Vec<String> = findings.iter().map(|finding| finding.fact.clone()).collect();
    let news = |finding: &Finding| !said.contains(&finding.fact);
    findings.extend(secret(wallet).into_iter().filter(news));
    findings.push(coldkey(wallet));
    findings.extend(coldkey_secret(&wallet.coldkey_file().with_file_name("coldkey")));
    (hotkey, findings)
}

/// The file with the hotkey's secrets: its mode, whether they are those of the address, and whether
/// a password is at hand where it needs one.
fn secret(wallet: &Wallet) -> Vec<Finding> {
    let path = &wallet.hotkey_file();
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
    findings.push(match wallet.look() {
        Err(e) => {
            let hint =
                "restore it and the file beside it from a backup, or from its phrase (btcli)";
            Finding::new(TOPIC, Level::Fault, e.to_string()).hint(hint)
        }
        Ok(SeenHotkey::Encrypted) => sealed(path),
        Ok(SeenHotkey::Plain(key)) => {
            let fact = format!("{place} holds the secret of {key}");
            Finding::new(TOPIC, Level::Ok, fact)
        }
    });
    findings
}

/// A key file that only its password opens.
fn sealed(path: &Path) -> Finding {
    let variable = keyfile::password_variable(path);
    let fact = "the key file is encrypted, so it was not looked into";
    match std::env::var_os(&variable) {
        Some(_) => Finding::new(TOPIC, Level::Ok, format!("{fact}; its password is in {variable}")),
        None => Finding::new(
            TOPIC,
            Level::Note,
            format!("{fact}: a password is asked for at every start"),
        )
        .hint(format!("a service without a terminal needs {variable}")),
    }
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

        let is_held = |f: &Finding| {
            f.level == Level::Ok && f.fact.ends_with(&format!("holds the secret of {key}"))
        };
        assert!(made.iter().any(is_held), "{made:?}");

        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(wallet.hotkey_file(), open).unwrap();
        let is_named =
            |(level, fact): &(Level, String)| *level == Level::Fault && fact.contains("mode 644");
        assert!(findings(&wallet).iter().any(is_named));

        std::fs::write(wallet.hotkey_file(), "no key").unwrap();
        let is_wrong =
            |(level, fact): &&(Level, String)| *level == Level::Fault && fact.contains("not a key");
        assert_eq!(findings(&wallet).iter().filter(is_wrong).count(), 1);
        std::fs::write(wallet.hotkey_file(), "$NACL").unwrap();
        let is_sealed = |(_, fact): &(Level, String)| fact.contains("was not looked into");
        assert!(findings(&wallet).iter().any(is_sealed));

        std::fs::write(dir.path().join("w/coldkey"), "secret").unwrap();
        let is_told = |(level, fact): &(Level, String)| {
            *level == Level::Warning
                && fact.contains("coldkey's secret")
                && !fact.contains("phrase")
        };
        assert!(findings(&wallet).iter().any(is_told));
    }
}
