//! Loading a model beside others: engines that run go on.

use crate::common::{options, tiny_config, write_checkpoint};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;
use targon_engine::clock::Clock;
use targon_engine::engine::Engine;
use targon_engine::engine::request::Request;
use targon_engine::models::Model;
use targon_engine::models::device::Device;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

/// Longer than any step takes here.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn an_engine_answers_while_another_model_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 5);
    let pool = Pool::new(2, Isa::best()).unwrap();
    let load = |progress: &dyn Fn(usize)| {
        Model::load_on(Device::Cpu, dir.path(), None, &pool, |done, _| progress(done)).unwrap()
    };
    let model = Arc::new(load(&|_| ()));
    let engine = Engine::start(model, pool.clone(), options(), Clock::system()).unwrap();
    let engine = Arc::new(engine);
    let answered = std::cell::Cell::new(0);
    load(&|_| {
        // On a thread of its own, so that a test which fails does not wait for ever.
        let (sender, receiver) = channel();
        let engine = Arc::clone(&engine);
        std::thread::spawn(move || {
            let mut request = Request::greedy(vec![3, 4, 5], 4);
            request.stop.ignore_eos = true;
            let running = engine.submit(request).unwrap();
            let _ = sender.send(running.collect_blocking().unwrap().steps.len());
        });
        let tokens = receiver.recv_timeout(PATIENCE).expect("the engine waits for the load");
        answered.set(answered.get() + tokens);
    });
    let layers = tiny_config()["num_hidden_layers"].as_u64().unwrap() as usize;
    assert_eq!(answered.get(), 4 * layers);
}
