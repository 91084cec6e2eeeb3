//! Tests PostgreSQL servers that vanish, stay silent or do not encrypt.

use super::sites::{another_run, block_on, id, postgres, refusal, response, round};
use crate::store::Store;
use crate::store::record::Sampled;
use crate::store::schema::VERSIONS;
use crate::store::session::SessionLimits;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};

/// Passes connections on to `server`, each until the client has sent `bytes`.
async fn cut_after(server: String, bytes: u64) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut server = TcpStream::connect(&server).await.unwrap();
            tokio::spawn(async move {
                let (client_in, mut client_out) = client.split();
                let (mut server_in, mut server_out) = server.split();
                let mut some = client_in.take(bytes);
                tokio::select! {
                    _ = copy(&mut some, &mut server_out) => {}
                    _ = copy(&mut server_in, &mut client_out) => {}
                }
            });
        }
    });
    port
}

/// The server vanishes after every so many bytes of a round: none is kept by half.
#[test]
fn a_server_that_goes_away_keeps_a_round_whole_or_not_at_all() {
    block_on(async {
        let Some(site) = postgres().await else { return };
        let direct = Store::open(&site.url, &another_run()).await.unwrap();
        let url = url::Url::parse(&site.url).unwrap();
        let server = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
        let responses = || (0..20).map(|uid| response(uid, "a", Sampled::Tps(1.0))).collect();
        let (mut halfway, mut kept) = (0, 0);
        for number in 0..60 {
            let mut through = url.clone();
            let port = cut_after(server.clone(), 1_500 + number * 500).await;
            through.set_port(Some(port)).unwrap();
            let next = round(number, number, responses());
            let saved = async {
                let store = Store::open(through.as_str(), &another_run()).await?;
                store.save_round(&next).await
            };
            let saved = saved.await;
            let found = direct.round(&id(number)).await.unwrap();
            match (&saved, &found) {
                (Ok(()), Some(found)) => assert_eq!(*found, next),
                (Err(e), found) => {
                    assert!(e.to_string().starts_with("postgres://"), "{e}");
                    halfway += usize::from(e.operation.starts_with("save round"));
                    // The answer to the commit may be lost; the next try finds it done.
                    assert!(found.as_ref().is_none_or(|found| *found == next));
                    direct.save_round(&next).await.unwrap();
                }
                (Ok(()), None) => panic!("round {number} was reported as kept and is not"),
            }
            kept += usize::from(saved.is_ok());
            assert_eq!(direct.round(&id(number)).await.unwrap(), Some(next));
        }
        assert!(halfway > 10 && kept > 10, "{halfway} failed halfway, {kept} kept");
        let samples = direct.samples(4, 100, 0).await.unwrap();
        assert_eq!(samples.len(), 60 * 20);
    });
}

#[test]
fn a_server_that_does_not_answer_is_given_up() {
    block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut silent, _) = listener.accept().await.unwrap();
            let mut bytes = [0; 64];
            while silent.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
            silent.shutdown().await.unwrap();
        });
        let url = format!("postgres://me:secret@127.0.0.1:{port}/db");
        let limits = SessionLimits::all(Duration::from_millis(200));
        let words =
            Store::open_as(&url, VERSIONS, limits, &another_run()).await.err().unwrap().to_string();
        let expected = format!(
            "postgres://me@127.0.0.1:{port}/db: cannot open the store: connecting took longer than \
             200ms"
        );
        assert_eq!(words, expected);
    });
}

#[test]
fn a_server_without_encryption_is_refused_where_the_url_demands_it() {
    block_on(async {
        let Some(site) = postgres().await else { return };
        let url = format!("{}?sslmode=require", site.url);
        let words = refusal(&url).await;
        assert!(words.contains("server does not support TLS"), "{words}");
        let words = refusal(&format!("{}?sslmode=sometimes", site.url)).await;
        assert!(words.contains("sometimes"), "{words}");
    });
}
