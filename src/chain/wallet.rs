//! Finds Bittensor wallets on disk: `PATH/NAME/hotkeys/HOTKEY` and `PATH/NAME/coldkeypub.txt`.
//!
//! A miner or validator signs with its hotkey only; the coldkey's secret is never read.

use super::keyfile::{self, KeyFileError};
use super::keys::{Hotkey, Keypair};
use secrecy::SecretString;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Bytes of a key file: real ones have under a thousand.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Where a wallet is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wallet {
    directory: PathBuf,
    hotkey: String,
}

/// What can be seen of a file with secrets without a password.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SeenHotkey {
    /// Its secrets are those of this key.
    Plain(Hotkey),
    /// Nothing.
    Encrypted,
}

/// Why a wallet cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{} {what}", path.display())]
pub struct WalletError {
    /// The file or directory that cannot be used.
    pub path: PathBuf,
    /// The rule for it, and what was found in its place.
    pub what: String,
    /// What the user can do about it.
    pub hint: Option<String>,
}

fn error(path: &Path, what: impl ToString) -> WalletError {
    WalletError { path: path.into(), what: what.to_string(), hint: None }
}

impl Wallet {
    /// The wallet `name` below `path`, with its hotkey `hotkey`.
    ///
    /// # Errors
    /// When a name is not a file name.
    pub fn new(path: &Path, name: &str, hotkey: &str) -> Result<Self, WalletError> {
        for (what, word) in [("wallet", name), ("hotkey", hotkey)] {
            if word.is_empty() || word.starts_with('.') || word.contains(['/', '\0']) {
                let what = format!("has no {what} of that name: {word:?} is not a file name");
                return Err(error(path, what));
            }
        }
        Ok(Self { directory: path.join(name), hotkey: hotkey.into() })
    }

    /// The file with the hotkey's secrets.
    pub fn hotkey_file(&self) -> PathBuf {
        self.directory.join("hotkeys").join(&self.hotkey)
    }

    /// The file with the hotkey's public part.
    fn hotkey_public_file(&self) -> PathBuf {
        self.directory.join("hotkeys").join(format!("{}pub.txt", self.hotkey))
    }

    /// The file with the coldkey's public part.
    pub fn coldkey_file(&self) -> PathBuf {
        self.directory.join("coldkeypub.txt")
    }

    /// The coldkey's public part.
    ///
    /// # Errors
    /// When the file is missing or wrong.
    pub fn coldkey(&self) -> Result<Hotkey, WalletError> {
        let path = self.coldkey_file();
        keyfile::public_key(&read(&path)?).map_err(|what| error(&path, what))
    }

    /// The hotkey's public part, from its public file, or from one with secrets that is not
    /// encrypted.
    ///
    /// # Errors
    /// When neither says.
    pub fn hotkey(&self) -> Result<Hotkey, WalletError> {
        let (public, secret) = (self.hotkey_public_file(), self.hotkey_file());
        let path = if public.exists() { public } else { secret };
        let bytes = read(&path)?;
        if keyfile::is_encrypted(&bytes).map_err(|what| error(&path, what))? {
            return Err(error(&path, "is encrypted, and there is no public file beside it"));
        }
        keyfile::public_key(&bytes).map_err(|what| error(&path, what))
    }

    /// Looks into the file with the hotkey's secrets, as far as that needs no password, and
    /// compares it with the public file beside it, if there is one.
    ///
    /// # Errors
    /// When it is missing or wrong, or the other file is that of another key.
    pub fn look(&self) -> Result<SeenHotkey, WalletError> {
        let (path, public_path) = (self.hotkey_file(), self.hotkey_public_file());
        let wrong = |what: KeyFileError| error(&path, what);
        let bytes = read(&path)?;
        if keyfile::is_encrypted(&bytes).map_err(wrong)? {
            return Ok(SeenHotkey::Encrypted);
        }
        let hotkey = keyfile::keypair(&bytes).map_err(wrong)?.hotkey();
        if public_path.exists() {
            let public = keyfile::public_key(&read(&public_path)?);
            let public = public.map_err(|what| error(&public_path, what))?;
            if public != hotkey {
                let what =
                    format!("must name {hotkey}, the key of {}, got {public}", path.display());
                return Err(error(&public_path, what));
            }
        }
        Ok(SeenHotkey::Plain(hotkey))
    }

    /// The hotkey. Where its file is encrypted, the password is that of its `BT_PW_` variable, else
    /// what `ask` gives.
    ///
    /// # Errors
    /// When the file is missing, open to others, or wrong.
    pub fn keypair(
        &self,
        ask: impl FnOnce(&Path) -> Result<SecretString, KeyFileError>,
    ) -> Result<Keypair, WalletError> {
        let path = self.hotkey_file();
        let wrong = |what: KeyFileError| error(&path, what);
        let bytes = read(&path)?;
        check_permissions(&path)?;
        if !keyfile::is_encrypted(&bytes).map_err(wrong)? {
            return keyfile::keypair(&bytes).map_err(wrong);
        }
        let variable = keyfile::password_variable(&path);
        let password = match std::env::var(&variable) {
            Ok(value) => keyfile::password_of(&variable, &Zeroizing::new(value)),
            Err(_) => ask(&path),
        };
        let json = keyfile::decrypt(&bytes, &password.map_err(wrong)?).map_err(wrong)?;
        keyfile::keypair(&json).map_err(wrong)
    }

    /// Makes a hotkey and writes its files, readable by their owner only.
    ///
    /// # Errors
    /// When one of them exists or cannot be written.
    pub fn create_hotkey(&self) -> Result<Keypair, WalletError> {
        let path = self.hotkey_file();
        let directory = self.directory.join("hotkeys");
        let failed = |path: &Path, e: std::io::Error| match e.kind() {
            ErrorKind::AlreadyExists => WalletError {
                hint: Some("choose another name, or move the file away yourself".into()),
                ..error(path, "exists, and keys are never overwritten")
            },
            _ => error(path, format!("cannot be written: {e}")),
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|e| failed(&directory, e))?;
        let public_path = self.hotkey_public_file();
        // Neither may be written where the other cannot.
        for path in [&path, &public_path] {
            if path.exists() {
                return Err(failed(path, ErrorKind::AlreadyExists.into()));
            }
        }
        let new = keyfile::generate().map_err(|what| error(&path, what))?;
        write_new(&path, &new.json).map_err(|e| failed(&path, e))?;
        write_new(&public_path, &new.public_json).map_err(|e| {
            remove(&path);
            failed(&public_path, e)
        })?;
        Ok(new.pair)
    }
}

/// Writes a file that must not exist yet, whole or not at all.
fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).inspect_err(|_| remove(path))
}

/// Removes what was just written: what is left of a key would only stand in the way of another. A
/// failure was the reason, and is reported either way.
fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, WalletError> {
    let failed = |e: std::io::Error| WalletError {
        hint: Some("--wallet.path, --wallet.name and --wallet.hotkey say where to look".into()),
        ..error(path, format!("cannot be read: {e}"))
    };
    let wrong = || error(path, format!("is not a key file of at most {FILE_BYTES_MAX} bytes"));
    let meta = fs::metadata(path).map_err(failed)?;
    if !meta.is_file() || meta.len() > FILE_BYTES_MAX {
        return Err(wrong());
    }
    // Room for all of it: where a buffer grows, secrets stay behind in the old one.
    let mut bytes = Zeroizing::new(Vec::with_capacity(FILE_BYTES_MAX as usize + 1));
    let file = fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(wrong());
    }
    Ok(bytes)
}

/// Secrets must be their owner's alone.
fn check_permissions(path: &Path) -> Result<(), WalletError> {
    let meta = fs::metadata(path).map_err(|e| error(path, format!("cannot be read: {e}")))?;
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let what = format!("must be readable by its owner only (0600), its mode is 0{mode:o}");
    let hint = Some(format!("chmod 600 {}", path.display()));
    Err(WalletError { hint, ..error(path, what) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never(_: &Path) -> Result<SecretString, KeyFileError> {
        Err(KeyFileError::NotAsked("no password was expected".into()))
    }

    #[test]
    fn a_new_hotkey_is_private_and_never_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(root.path(), "w", "h").unwrap();
        let made = wallet.create_hotkey().unwrap();
        assert_eq!(wallet.keypair(never).unwrap().hotkey(), made.hotkey());
        let mode = fs::metadata(wallet.hotkey_file()).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        let before = fs::read(wallet.hotkey_file()).unwrap();
        let error = wallet.create_hotkey().unwrap_err();
        assert!(error.to_string().contains("never overwritten"), "{error}");
        assert_eq!(fs::read(wallet.hotkey_file()).unwrap(), before);
    }

    #[test]
    fn a_hotkey_is_looked_at_without_its_password() {
        let root = tempfile::tempdir().unwrap();
        let [one, other] = ["h", "o"].map(|name| Wallet::new(root.path(), "w", name).unwrap());
        let absent = one.look().unwrap_err().to_string();
        assert!(absent.contains("w/hotkeys/h cannot be read: "), "{absent}");
        let made = one.create_hotkey().unwrap().hotkey();
        assert_eq!(one.look(), Ok(SeenHotkey::Plain(made)));
        let another = other.create_hotkey().unwrap().hotkey();
        fs::copy(other.hotkey_public_file(), one.hotkey_public_file()).unwrap();
        let mixed = one.look().unwrap_err();
        assert_eq!(mixed.path, one.hotkey_public_file());
        assert!(mixed.what.starts_with(&format!("must name {made}, the key of ")), "{mixed}");
        assert!(mixed.what.ends_with(&format!(", got {another}")), "{mixed}");
        fs::write(one.hotkey_file(), "no key").unwrap();
        assert!(one.look().unwrap_err().to_string().contains("is not a key file"));
        fs::write(one.hotkey_file(), "$NACL and more").unwrap();
        assert_eq!(one.look(), Ok(SeenHotkey::Encrypted));
    }

    #[test]
    fn a_public_file_that_cannot_be_written_leaves_no_hotkey_behind() {
        let root = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(root.path(), "w", "h").unwrap();
        fs::create_dir_all(root.path().join("w/hotkeys")).unwrap();
        // A link to nowhere does not exist, and cannot be made anew.
        std::os::unix::fs::symlink("/no/such/file", wallet.hotkey_public_file()).unwrap();
        assert!(wallet.create_hotkey().is_err());
        assert!(!wallet.hotkey_file().exists());
    }

    #[test]
    fn faults_name_the_file_and_the_rule() {
        let root = tempfile::tempdir().unwrap();
        for (name, hotkey) in [("", "h"), ("..", "h"), ("a/b", "h"), ("w", "../k")] {
            let error = Wallet::new(root.path(), name, hotkey).unwrap_err();
            assert!(error.to_string().contains("not a file name"), "{error}");
        }
        let wallet = Wallet::new(root.path(), "w", "h").unwrap();
        let missing = wallet.keypair(never).unwrap_err();
        assert!(missing.to_string().contains("w/hotkeys/h cannot be read"), "{missing}");
        wallet.create_hotkey().unwrap();
        let open = fs::Permissions::from_mode(0o644);
        fs::set_permissions(wallet.hotkey_file(), open).unwrap();
        let error = wallet.keypair(never).unwrap_err();
        assert!(error.to_string().contains("its mode is 0644"), "{error}");
        assert!(error.hint.unwrap().starts_with("chmod 600 "));
    }

    #[test]
    fn an_encrypted_hotkey_asks_for_its_password() {
        let vector = &crate::chain::tests::vectors("wallet_vectors.json")["encrypted_coldkey"];
        let root = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(root.path(), "w", "h").unwrap();
        fs::create_dir_all(root.path().join("w/hotkeys")).unwrap();
        let bytes = hex::decode(vector["file_hex"].as_str().unwrap()).unwrap();
        write_new(&wallet.hotkey_file(), &bytes).unwrap();
        assert!(wallet.keypair(never).unwrap_err().to_string().contains("no password"));
    }
}
