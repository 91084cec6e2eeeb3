//! Implements [`Ports`] for a real validator: a chain, miners over HTTP, models in this process, a
//! database.

use super::checking;
use super::emission;
use super::hub::OrganicsHub;
use super::keeping::Keeper;
use super::ports::{AnswerToCheck, Decided, MinerQuery, NotSent, Ports, Stand};
use super::resident::Resident;
use super::residents::{Hold, Residents};
use super::rewriting::{self, Rewriting};
use super::subnet::Subnet;
use crate::chain::error::ChainError;
use crate::chain::keys::{Hotkey, Keypair};
use crate::chain::metagraph::Metagraph;
use crate::chain::weights::outcome::{Approval, Call, Order, ReadBack, SendError, SentWeights};
use crate::chain::weights::{Vector, VectorError};
use crate::chain::{Chain, Head};
use crate::chance::Chance;
use crate::clock::Clock;
use crate::entropy::Entropy;
use crate::store::record::{EpochWeights, Round, SentBlocks, WeightsState};
use crate::store::{Removed, Store, WeightsClaim};
use crate::validator::eligible::Member;
use crate::validator::models::{self, Mode};
use crate::validator::prompt::dataset::Passages;
use crate::validator::prompt::{self, Draft};
use crate::validator::query::{QueryError, QueryFault, QuerySigner, Size, Streamed, Target};
use crate::validator::round::ask::{Endpoint, QueryContent, QueryPrompt};
use crate::validator::round::{
    AnswerReport, AnswerVerdict, Answered, BAD_STREAM, BROKEN_OFF, Ending, LATE, Offer, UNREACHABLE,
};
use crate::validator::scores::rules::ScoringRules;
use crate::verify;
use crate::verify::question::understand;
use anyhow::{Context, anyhow, bail};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// Epochs of which the extrinsic is known in memory: one is under way.
const MARKED_MAX: usize = 8;

/// The parts of a validator.
pub struct World<C: Chain> {
    /// Where the chain is read, and weights are sent to.
    pub chain: C,
    /// The hotkey that signs queries and weights.
    pub signer: Arc<Keypair>,
    /// The number of the subnet.
    pub netuid: u16,
    /// Where rounds, samples, evidence and weights are kept.
    pub store: Store,
    /// The time that records and signatures have.
    pub clock: Clock,
    /// Where prompts, names of requests and the choice of checked rows come from.
    pub entropy: Entropy,
    /// The models that it verifies with.
    pub residents: Residents,
    /// Whether the engine writes prompts.
    pub rewriting: Rewriting,
    /// The rules of a verification; `None` takes those that the request asks for.
    pub rules: Option<verify::Profile>,
    /// The hub, where there is one.
    pub hub: OrganicsHub,
    /// How long records are kept.
    pub keeper: Keeper,
    /// Where the list of models comes from that miners are told.
    pub mode: Option<Mode>,
    /// What prompts are about.
    pub source: Passages,
    /// How samples become weights.
    pub scoring: ScoringRules,
    /// How queries wait: between two reads, and in all.
    pub waits: (Duration, Duration),
    /// Blocks after the last round from which on old samples do not count.
    pub away_max: u64,
    /// Version that weights name; `None` is the subnet's own.
    pub version_key: Option<u64>,
    /// The state that is kept between two calls.
    pub memory: WorldState,
}

/// The state that is kept between two calls.
#[derive(Default)]
pub struct WorldState {
    listed: Mutex<Vec<String>>,
    /// Epochs whose weights this process has remembered as sent, with the extrinsic's hash.
    marked: Mutex<BTreeMap<u64, String>>,
}

impl<C: Chain> World<C> {
    fn target(&self, member: &Member, size: Size) -> Target {
        Target {
            url: format!("http://{}", member.address),
            hotkey: Some(member.hotkey),
            signer: Some(QuerySigner {
                key: Arc::clone(&self.signer),
                entropy: self.entropy.clone(),
            }),
            api_key: None,
            read_timeout: self.waits.0,
            timeout: self.waits.1,
            size,
        }
    }

    /// The models that miners are told and scored for.
    pub fn listed(&self) -> Vec<String> {
        self.memory.listed.lock().clone()
    }

    /// Remembers an extrinsic as sent, before it is: whether it may be.
    fn remember(&self, epoch: u64, sent: &SentWeights) -> anyhow::Result<()> {
        let (hash, reveal_round) = (sent.hash.clone(), sent.reveal_round);
        let state = WeightsState::Sent { hash, blocks: Some(blocks(sent)), reveal_round };
        // The pool has refused the one before for certain.
        let refused = self.memory.marked.lock().get(&epoch).cloned();
        let marking = async {
            match &refused {
                None => self.store.mark_weights(self.netuid, epoch, &state).await,
                Some(hash) => {
                    self.store.replace_sent_weights((self.netuid, epoch), hash, &state).await
                }
            }
        };
        // The chain asks from inside its own future, and does not send before it is told.
        let marked = tokio::task::block_in_place(|| Handle::current().block_on(marking));
        match marked? {
            WeightsClaim::Ours => {
                let mut marked = self.memory.marked.lock();
                marked.insert(epoch, sent.hash.clone());
                while marked.len() > MARKED_MAX {
                    marked.pop_first();
                }
                Ok(())
            }
            WeightsClaim::Taken(state) => {
                bail!("another process is setting these weights (state: {})", state.word())
            }
        }
    }

    /// Takes back that an epoch's weights were sent, where the chain has refused them for certain.
    async fn forget(&self, epoch: u64) {
        let Some(hash) = self.memory.marked.lock().remove(&epoch) else { return };
        match self.store.withdraw_sent_weights((self.netuid, epoch), &hash).await {
            Ok(WeightsClaim::Ours) => {}
            Ok(WeightsClaim::Taken(state)) => {
                tracing::warn!(epoch, state = state.word(), "refused weights are not planned anew");
            }
            Err(e) => tracing::warn!(epoch, "refused weights are not planned anew: {e}"),
        }
    }

    async fn draft(&self, model: &str, endpoint: Endpoint) -> anyhow::Result<QueryPrompt> {
        let resident = self.residents.get(model).context("the model is not loaded")?;
        let date = prompt::date(self.clock.unix_ms())?;
        let mut chance = Chance::of(&self.entropy);
        let draft = Draft::draw(&self.source, &date, &mut chance);
        let query =
            rewriting::query(self.rewriting, &resident, (model, &draft), &mut chance).await?;
        let prompt = draft.finish(query.as_deref());
        let mut body = json!({"model": model, "max_tokens": 1});
        let content = match endpoint {
            Endpoint::Chat => {
                body["messages"] = prompt.messages();
                QueryContent::Messages(prompt.messages())
            }
            Endpoint::Completion => {
                body["prompt"] = prompt.text().into();
                QueryContent::Text(prompt.text())
            }
        };
        let understood = understand(&resident.verifier, &body, self.clock.unix_ms()).await?;
        let tokens = understood.requests.first().map_or(0, |request| request.prompt.len());
        Ok(QueryPrompt { content, tokens })
    }
}

/// What a record of weights that `hotkey` has sent says of the extrinsic.
fn sent(hotkey: Hotkey, weights: &EpochWeights) -> anyhow::Result<SentWeights> {
    let (hash, reveal_round) = match &weights.state {
        WeightsState::Sent { hash, reveal_round, .. } => (hash.clone(), *reveal_round),
        WeightsState::Committed { hash, reveal_round, .. } => (hash.clone(), Some(*reveal_round)),
        other => bail!("nothing was sent: {other:?}"),
    };
    let SentBlocks { after, until } = emission::sent_blocks(weights);
    Ok(SentWeights {
        netuid: weights.netuid,
        mechanism: 0,
        hotkey,
        vector: vector(weights)?,
        hash,
        call: if reveal_round.is_some() { Call::Commit } else { Call::Set },
        block: after,
        until,
        reveal_round,
    })
}

/// The weights above zero; the chain stores no zeros.
fn vector(weights: &EpochWeights) -> Result<Vector, VectorError> {
    let paid = weights.values.iter().copied().filter(|(_, value)| *value > 0);
    Vector::new(paid.collect())
}

fn blocks(sent: &SentWeights) -> SentBlocks {
    SentBlocks { after: sent.block, until: sent.until }
}

/// How an answer ended, and who is at fault.
fn ending(outcome: Result<(), QueryError>) -> Ending {
    let Err(e) = outcome else { return Ending::Whole };
    let what = e.to_string();
    let cause = match e.fault() {
        QueryFault::Own => return Ending::Ours(what),
        QueryFault::Unreachable => UNREACHABLE,
        QueryFault::Late => LATE,
        QueryFault::Broken => BROKEN_OFF,
        QueryFault::Status => "STATUS",
        QueryFault::Malformed => BAD_STREAM,
    };
    Ending::Fault { cause, what }
}

impl<C: Chain> Ports for World<C> {
    async fn metagraph(&self) -> Result<Metagraph, ChainError> {
        self.chain.metagraph(self.netuid).await
    }

    async fn follow(&self, on_head: &(dyn Fn(Head) -> bool + Sync)) -> Result<(), ChainError> {
        self.chain.follow(on_head).await
    }

    async fn doubt(&self) {
        self.chain.doubt().await;
    }

    async fn send(&self, weights: &EpochWeights) -> Result<WeightsState, NotSent> {
        let vector = vector(weights).map_err(|e| NotSent::Never(e.to_string()))?;
        let (netuid, version_key) = (self.netuid, self.version_key);
        let order = Order { netuid, mechanism: 0, vector, version_key };
        let show = |words: &str| {
            tracing::info!("extrinsic: {words}");
            true
        };
        let refused = Mutex::new(None);
        let signed = |sent: &SentWeights| match self.remember(weights.epoch, sent) {
            Ok(()) => true,
            Err(why) => {
                *refused.lock() = Some(why);
                false
            }
        };
        let asked = Approval { show: &show, signed: &signed };
        match self.chain.set_weights(&self.signer, &order, &asked).await {
            Ok(Some(sent)) => {
                let (blocks, hash) = (Some(blocks(&sent)), sent.hash);
                Ok(match sent.reveal_round {
                    Some(reveal_round) => WeightsState::Committed { hash, blocks, reveal_round },
                    None => WeightsState::Sent { hash, blocks, reveal_round: None },
                })
            }
            Ok(None) => {
                let why = refused.lock().take();
                let why = why.unwrap_or_else(|| anyhow!("they were not to be sent"));
                Err(NotSent::Later(format!("weights are not remembered as sent: {why}")))
            }
            Err(e @ SendError::Uncertain { .. }) => Err(NotSent::Unknown(e.to_string())),
            Err(e) if e.is_passing() => {
                self.forget(weights.epoch).await;
                Err(NotSent::Later(e.to_string()))
            }
            Err(e) => Err(NotSent::Never(e.to_string())),
        }
    }

    async fn look_up(&self, weights: &EpochWeights) -> anyhow::Result<Stand> {
        match self.chain.read_back(&sent(self.signer.hotkey(), weights)?).await {
            ReadBack::Confirmed => Ok(Stand::Confirmed),
            ReadBack::Waiting { .. } => Ok(Stand::Waiting),
            ReadBack::Differs { found } => Ok(Stand::Others(found)),
            ReadBack::NotThere { why, .. } => Ok(Stand::NotThere(why)),
            ReadBack::Unreadable(e) => Err(e.into()),
        }
    }

    async fn list(&self) -> anyhow::Result<()> {
        let listed = match &self.mode {
            Some(mode) => mode.list(&self.clock).await?,
            None => self.residents.names(),
        };
        *self.memory.listed.lock() = listed;
        Ok(())
    }

    async fn models(&self, member: &Member) -> anyhow::Result<Vec<String>> {
        let target = self.target(member, Size::of_tokens(0));
        let broadcast = models::broadcast(&self.listed());
        Ok(models::exchange(&target, broadcast, &self.clock).await?)
    }

    async fn ask(&self, query: MinerQuery) -> Answered {
        let MinerQuery { member, path, body, max_tokens } = query;
        let target = self.target(&member, Size::of_tokens(max_tokens));
        let streamed = target.stream(path, &body, &self.clock, |_| {}).await;
        let Streamed { arrivals, ended, outcome } = streamed;
        Answered { arrivals, ended, ending: ending(outcome) }
    }

    fn offers(&self) -> Vec<Offer> {
        let listed = self.memory.listed.lock();
        let is_listed = |(name, _): &(String, Arc<Resident>)| listed.contains(name);
        let offer = |(name, resident): (String, Arc<Resident>)| {
            let verifier = &resident.verifier;
            let chat = verifier.model.text.chat.as_ref().map(|_| Endpoint::Chat);
            let endpoints = [Endpoint::Completion].into_iter().chain(chat).collect();
            Offer { name, endpoints, context_max: verifier.context_max }
        };
        self.residents.here().into_iter().filter(is_listed).map(offer).collect()
    }

    async fn prompt(&self, model: &str, endpoint: Endpoint) -> anyhow::Result<QueryPrompt> {
        self.draft(model, endpoint).await
    }

    async fn verify(&self, case: AnswerToCheck) -> AnswerReport {
        let Some(resident) = self.residents.get(&case.model) else {
            let verdict =
                AnswerVerdict::Unscored(format!("the model {} is not loaded", case.model));
            return AnswerReport::bare(verdict);
        };
        let now_ms = self.clock.unix_ms();
        let how = (self.rules, now_ms);
        checking::verify(&resident, (&self.store, &self.entropy), how, case).await
    }

    async fn rotate(&self) -> anyhow::Result<()> {
        let listed = self.listed();
        let known = self.residents.names();
        if !listed.iter().any(|name| known.contains(name)) {
            bail!(
                "none of the {} models that miners are asked for is in --models: {}",
                listed.len(),
                known.join(", ")
            );
        }
        self.residents.rotate(&listed).await
    }

    fn hold(&self, model: &str) -> Hold {
        self.residents.hold(model)
    }

    async fn pull(&self, subnet: &Subnet) -> anyhow::Result<usize> {
        self.hub.pull(&self.residents, self.rules, subnet).await
    }

    fn wants_reports(&self) -> bool {
        self.hub.wants_stats()
    }

    async fn report(&self, round: &Round) -> anyhow::Result<()> {
        let (last, since) = (self.scoring.window as u32, round.block.saturating_sub(self.away_max));
        let samples = self.store.samples(self.netuid, last, since).await?;
        self.hub.tell(round, &self.listed(), &samples).await
    }

    async fn tidy(&self) -> anyhow::Result<Removed> {
        self.keeper.tidy(&self.store).await
    }

    async fn save(&self, round: &Round) -> anyhow::Result<()> {
        Ok(self.store.save_round(round).await?)
    }

    async fn decide(&self, subnet: &Subnet) -> anyhow::Result<Decided> {
        let models = self.listed();
        let known = |uid, hotkey: &str| self.hub.organics(uid, hotkey);
        let (rules, away_max) = (&self.scoring, self.away_max);
        checking::decide(&self.store, (rules, away_max), subnet, &models, known).await
    }

    async fn planned(&self, epoch: u64) -> anyhow::Result<Option<EpochWeights>> {
        Ok(self.store.weights_of(self.netuid, epoch).await?)
    }

    async fn unfinished(&self) -> anyhow::Result<Vec<EpochWeights>> {
        let is_sent = |weights: &EpochWeights| {
            weights.netuid == self.netuid && weights.state != WeightsState::Planned
        };
        let unfinished = self.store.unfinished_weights().await?;
        Ok(unfinished.into_iter().filter(is_sent).collect())
    }

    async fn confirmed(&self) -> anyhow::Result<Option<EpochWeights>> {
        Ok(self.store.confirmed_weights(self.netuid).await?)
    }

    async fn plan(&self, weights: &EpochWeights) -> anyhow::Result<Option<WeightsState>> {
        match self.store.plan_weights(weights).await? {
            WeightsClaim::Ours => Ok(None),
            WeightsClaim::Taken(state) => Ok(Some(state)),
        }
    }

    async fn mark(&self, epoch: u64, state: &WeightsState) -> anyhow::Result<()> {
        let marked = self.store.mark_weights(self.netuid, epoch, state).await;
        if let WeightsClaim::Taken(found) = marked? {
            tracing::debug!(epoch, ?found, "weights are as far already");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";

    /// What a peer does with a connection, once it has read something of the request.
    #[derive(Clone, Copy, Debug)]
    enum Peer {
        /// Says this and closes.
        Says(&'static str),
        /// Says the first once and the second for ever.
        Repeats(&'static str, &'static str),
        /// Says the first once, and a byte of the second every 20 ms.
        Drips(&'static str, &'static str),
        /// Says the first and nothing more.
        Hangs(&'static str),
        /// Closes at once, with what was sent unread.
        Leaves,
    }

    async fn act(peer: Peer, mut stream: TcpStream) -> std::io::Result<()> {
        if matches!(peer, Peer::Leaves) {
            return Ok(());
        }
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).await?;
        match peer {
            Peer::Says(text) => stream.write_all(text.as_bytes()).await,
            Peer::Repeats(once, again) => {
                stream.write_all(once.as_bytes()).await?;
                let block = again.repeat(1 + 65_536 / again.len());
                loop {
                    stream.write_all(block.as_bytes()).await?;
                }
            }
            Peer::Drips(once, again) => {
                stream.write_all(once.as_bytes()).await?;
                for byte in again.bytes().cycle() {
                    stream.write_all(&[byte]).await?;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Ok(())
            }
            Peer::Hangs(once) => {
                stream.write_all(once.as_bytes()).await?;
                std::future::pending().await
            }
            Peer::Leaves => Ok(()),
        }
    }

    async fn listen(peer: Peer) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A peer whose reader leaves has an error, which is its own.
                tokio::spawn(act(peer, stream));
            }
        });
        address
    }

    async fn ask(address: SocketAddr) -> Answered {
        let target = Target {
            url: format!("http://{address}"),
            hotkey: None,
            signer: None,
            api_key: None,
            read_timeout: Duration::from_millis(300),
            timeout: Duration::from_millis(1500),
            size: Size::of_tokens(100),
        };
        let body = json!({"model": "m", "stream": true});
        let streamed = target.stream("/v1/completions", &body, &Clock::system(), |_| {}).await;
        let Streamed { arrivals, ended, outcome } = streamed;
        Answered { arrivals, ended, ending: ending(outcome) }
    }

    #[test]
    fn what_was_sent_is_looked_for_as_its_record_says() {
        let of = |state: WeightsState| {
            let values = vec![(0, 0), (1, u16::MAX)];
            let weights = EpochWeights {
                netuid: 4,
                epoch: 9,
                block: 100,
                values,
                explanation: json!({}),
                state,
            };
            sent(Hotkey([7; 32]), &weights)
        };
        let (hash, blocks) = ("0xaa".to_owned(), Some(SentBlocks { after: 97, until: 129 }));
        let lost = of(WeightsState::Sent { hash: hash.clone(), blocks, reveal_round: Some(5) });
        let lost = lost.unwrap();
        assert_eq!((lost.call, lost.reveal_round), (Call::Commit, Some(5)), "a commit stays one");
        assert_eq!((lost.block, lost.until, lost.vector.values().len()), (97, 129, 1));
        let plain = of(WeightsState::Sent { hash: hash.clone(), blocks, reveal_round: None });
        assert_eq!(plain.unwrap().call, Call::Set);
        // Records of before version 3 do not say it: no extrinsic is signed so late.
        let old = of(WeightsState::Committed { hash, blocks: None, reveal_round: 5 }).unwrap();
        assert_eq!((old.block, old.until), (100, 164));
        assert!(of(WeightsState::Planned).is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_hostile_answer_ends_soon_with_a_name_of_its_own() {
        const TOKEN: &str = "data: {\"choices\":[{\"text\":\"x\"}]}\n\n";
        const ENDLESS: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40000000\r\n";
        const MOVED: &str = "HTTP/1.1 307 Moved\r\nlocation: http://127.0.0.1:1/\r\n\
            content-length: 0\r\n\r\n";
        const TLS: &str = "\u{15}\u{3}\u{3}\0\u{2}\u{2}\u{46}";
        for (peer, cause, words) in [
            (Peer::Repeats(HEAD, TOKEN), BAD_STREAM, "more events than it can need"),
            (Peer::Repeats(HEAD, ": hello\n"), BAD_STREAM, "the answer has more than"),
            (Peer::Repeats(HEAD, "x"), BAD_STREAM, "the answer has more than"),
            (Peer::Repeats(ENDLESS, "a"), BAD_STREAM, "the answer has more than"),
            (Peer::Repeats(HEAD, "data: [[[[[[[[[[[[[[[[[["), BAD_STREAM, "more than"),
            (Peer::Repeats("HTTP/1.1 200 OK\r\n", "a: b\r\n"), "BROKEN_OFF", "http"),
            (Peer::Drips(HEAD, TOKEN), "LATE", "timed out"),
            (Peer::Drips("HTTP/1.1 200 OK\r\n", "a"), "LATE", "timed out"),
            (Peer::Hangs(HEAD), "LATE", "timed out"),
            (Peer::Hangs(""), "LATE", "timed out"),
            (Peer::Leaves, "BROKEN_OFF", "http"),
            (Peer::Says(TLS), "BROKEN_OFF", "http"),
            (Peer::Says(MOVED), "STATUS", "307"),
            (Peer::Says("HTTP/1.1 500 No\r\n\r\nno room"), "STATUS", "no room"),
            (Peer::Says(HEAD), BAD_STREAM, "ends without [DONE]"),
        ] {
            let address = listen(peer).await;
            let asked = tokio::time::timeout(Duration::from_secs(10), ask(address)).await;
            let Answered { arrivals, ended, ending } = asked.unwrap();
            let Ending::Fault { cause: got, what } = ending else { panic!("{peer:?}: {ending:?}") };
            assert_eq!(got, cause, "{peer:?}: {what}");
            assert!(what.contains(words), "{peer:?}: {what}");
            assert!(ended < Duration::from_secs(5) && arrivals.len() <= 116, "{peer:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_answer_ends_when_its_last_part_is_read() {
        let whole = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n\
            data: {\"choices\":[{\"text\":\"x\"}]}\n\ndata: [DONE]\n\n";
        let Answered { arrivals, ended, ending } = ask(listen(Peer::Says(whole)).await).await;
        assert_eq!(ending, Ending::Whole);
        // Token and end came in one part, so they have one time.
        assert_eq!(arrivals.iter().map(|arrival| arrival.at).collect::<Vec<_>>(), [ended]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn bombs_of_json_are_refused_and_nobody_at_home_is_told_apart() {
        for (bomb, words) in [
            (format!("data: [{}0]\n\n", "0,".repeat(90_000)), "more values than it can need"),
            (format!("data: {}{}\n\n", "[".repeat(70), "]".repeat(70)), "nests more than 64 deep"),
            (format!("data: {}\n\n", "[".repeat(9_000)), "recursion limit"),
            (format!("data: \"{}\"\n\n", "x".repeat(700_000)), "the answer has more than"),
        ] {
            let text: &'static str = Box::leak(format!("{HEAD}{bomb}").into_boxed_str());
            let answered = ask(listen(Peer::Says(text)).await).await;
            let Ending::Fault { cause: BAD_STREAM, what } = answered.ending else {
                panic!("{words}: {:?}", answered.ending)
            };
            assert!(what.contains(words), "{what}");
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let ending = ask(address).await.ending;
        assert!(matches!(ending, Ending::Fault { cause: UNREACHABLE, .. }), "{ending:?}");
        // A chunk that is fine keeps what came before the connection broke.
        let cut = "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\ndata: {\"choices\":[]}\n\n";
        let answered = ask(listen(Peer::Says(cut)).await).await;
        assert_eq!(answered.arrivals.len(), 1);
        assert!(matches!(answered.ending, Ending::Fault { cause: "BROKEN_OFF", .. }));
    }
}
