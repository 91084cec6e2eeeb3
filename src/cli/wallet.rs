//! Runs `wallet`: shows a wallet, or makes a hotkey for tests and small set-ups.

use super::Failure;
use super::out::outln;
use super::subnet_args::{WalletArgs, wallet_failure};
use crate::chain::wallet::SeenHotkey;
use clap::{Args, Subcommand};

/// Arguments of `wallet`.
#[derive(Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Print the addresses and files of a wallet, or what is wrong with them; never a secret.
    Show(WalletArgs),
    /// Make a hotkey. Only the owner can read its files, and no file is overwritten.
    NewHotkey(WalletArgs),
}

pub(super) fn run(args: &Arguments) -> Result<(), Failure> {
    let (wallet, hotkey, seen) = match &args.action {
        Action::Show(args) => {
            let wallet = args.wallet()?;
            let hotkey = wallet.hotkey().map_err(wallet_failure)?;
            let seen = wallet.look().map_err(wallet_failure)?;
            (wallet, hotkey, seen)
        }
        Action::NewHotkey(args) => {
            let wallet = args.wallet()?;
            let hotkey = wallet.create_hotkey().map_err(wallet_failure)?.hotkey();
            (wallet, hotkey, SeenHotkey::Plain(hotkey))
        }
    };
    let remark = match seen {
        SeenHotkey::Plain(_) => "",
        SeenHotkey::Encrypted => "  (encrypted: not looked into)",
    };
    outln!("hotkey   {hotkey}  {}{remark}", wallet.hotkey_file().display());
    match wallet.coldkey() {
        Ok(coldkey) => outln!("coldkey  {coldkey}  {}", wallet.coldkey_file().display()),
        Err(_) if !wallet.coldkey_file().exists() => outln!("coldkey  none"),
        Err(e) => return Err(wallet_failure(e)),
    }
    Ok(())
}
